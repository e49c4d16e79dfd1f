"""Before any test module is imported."""

import os
import shutil

# Without a GPU the kernels run in Triton's interpreter, which has to be asked for before anything imports Triton.
if os.environ.get("CUDA_VISIBLE_DEVICES") == "" or shutil.which("nvidia-smi") is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")
