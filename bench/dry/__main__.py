"""Runs a benchmark as on a GPU, without one: ``python -m bench.dry MODULE [ARGUMENT ...]``, or ``-c CODE``.

Tensors are on the CPU, so the module needs ``--device cpu``. The CUDA kernels run on the tests' emulator, which is
compiled first if necessary, the Triton kernels in Triton's interpreter; torch.compile only traces. Every call runs
once, and times have no meaning; layers have two heads. ``bin`` holds stand-ins for programs.
"""

import functools
import os
import runpy
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import torch  # noqa: E402
from torch.nn.attention import flex_attention  # noqa: E402

sys.path.insert(1, str(Path(__file__).parents[2] / "tests/helpers"))
import emulated  # noqa: E402
import interpreted  # noqa: E402

from .. import device  # noqa: E402

with ThreadPoolExecutor(os.cpu_count()) as pool:
    operators = emulated.load(emulated.built("plain", pool))
interpreted.serve_cpu()
interpreted.without_vain_work(setattr)
device.Device.most = 1
torch.set_num_threads(1)
flex_attention._validate_device = lambda *_: None  # refuses gradients on a CPU because its kernels lack them
torch.compile = functools.partial(torch.compile, backend="eager")
_, name, *arguments = sys.argv
if name == "bench.layer_gpu":
    from .. import models

    models.V3_BASE |= dict(hidden_size=128, num_attention_heads=2, intermediate_size=64)
if name == "bench.check":
    from deberta_fast import selfcheck
    from deberta_fast.op import speed

    speed.SHAPES, speed.WIDTH = {"short": (1, 16), "long": (1, 32)}, 1  # one head
    problems = selfcheck.problems
    selfcheck.problems = lambda kind: [problems(kind)[0]._replace(batch=1, heads=1, lengths=(20, 20))]
if name == "-c":
    exec(arguments[0], {"__name__": "__main__"})
else:
    sys.argv = [name, *arguments]
    runpy.run_module(name, run_name="__main__", alter_sys=True)
