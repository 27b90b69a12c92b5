"""Part: gradients of a step with flash attention, against plain attention."""

from experiments.gpu.child import serve
from experiments.gpu.gradients import measure, prepare

if __name__ == "__main__":
    serve(measure, prepare)
