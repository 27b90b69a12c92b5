"""Part: gradients of a step in bfloat16 and default precision, against float32 at the highest."""

from experiments.gpu.child import serve
from experiments.gpu.gradients import measure, prepare

if __name__ == "__main__":
    serve(measure, prepare)
