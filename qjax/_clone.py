"""Lets `import qjax` work from the root of a clone.

There `models`, `calibrate` and `kernels` lie beside the folder `qjax`, and Python takes that folder
before any installed copy. In a wheel they lie inside, and nothing is done.
"""

from pathlib import Path

import qjax

_HERE = Path(__file__).resolve().parent

if not (_HERE / "models").is_dir() and (_HERE.parent / "models").is_dir():
    qjax.__path__.append(str(_HERE.parent))
