# SPDX-License-Identifier: Apache-2.0
"""How fast weight files are read to tell a model from others: `python benchmarks/weights_digest.py FILE...`"""

from __future__ import annotations

import os
import sys
import tempfile
import threading
import time
from pathlib import Path

from loracache.connectors.vllm.identity.weight_files import DigestCache, FileState, Weights, content_digest

if __name__ == "__main__":
    files = tuple((Path(name), FileState.of(Path(name))) for name in sys.argv[1:])
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        began = time.monotonic()
        content_digest(Weights("", files), DigestCache(), threading.Event())
    took, size = time.monotonic() - began, sum(state.size for _, state in files) / 1e9
    print(f"{size:.2f} GB in {took:.2f} s: {size / took:.2f} GB/s")
