"""Multi-crop augmentation on the device."""
