"""The Python environment of the peers: made once, kept in a cache, with the running environment's own torch.

The peers' packages go into a `venv` of their own, so that nothing is installed where Lockstep runs. A `.pth` file there
names the running environment's packages: pip finds what is installed already, and all loops share one torch.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import sysconfig
from importlib.metadata import version
from pathlib import Path

# What the adapters in this folder import, besides what Lockstep needs itself.
REQUIREMENTS = (
    "lightning>=2.5,<3",
    "pytorch-accelerated>=0.1.50,<0.2",
    "pytorch-ignite>=0.5.2,<0.6",
    "timm>=1.0,<2",
    "transformers>=4.50,<6",
    "tqdm>=4.60,<5",
)
COMPLETE = "complete"  # a file that is there once everything is installed
ROOT = Path(__file__).parents[2]


def cache_folder() -> Path:
    """Where the environment lies unless a folder is named."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "lockstep-benchmarks"


def peers_python(folder: Path | None = None) -> Path:
    """The interpreter of the peers' environment, which is made first if it is not there.

    `folder` holds one environment for each interpreter, torch and list of requirements. Raises `RuntimeError`, with
    pip's last line, if the packages cannot be installed.
    """
    home = (folder or cache_folder()) / f"peers-{_key()}"
    python = home / "bin" / "python"
    if (home / COMPLETE).exists():
        return python
    print(f"making the peers' environment in {home}", file=sys.stderr, flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(home)], check=True)
    _share_packages(python)
    same_torch = home / "constraints.txt"
    same_torch.write_text(f"torch=={version('torch')}\n")
    options = ["--quiet", "--constraint", same_torch]
    command = [python, "-m", "pip", "install", *options, *REQUIREMENTS]
    installed = subprocess.run(command, capture_output=True, text=True, check=False)
    if installed.returncode != 0:
        reason = (installed.stderr.strip() or "no reason given").splitlines()[-1]
        raise RuntimeError(f"the peers' packages cannot be installed: {reason}")
    (home / COMPLETE).touch()
    return python


def _key() -> str:
    """Of all that an environment depends on."""
    parts = (sys.version, sys.prefix, version("torch"), *REQUIREMENTS)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def _share_packages(python: Path) -> None:
    """Let the new environment see the packages of the running one, after its own."""
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    own = subprocess.run(
        [python, "-c", ask], check=True, capture_output=True, text=True
    )
    shared = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    Path(own.stdout.strip(), "shared.pth").write_text("\n".join(shared) + "\n")
