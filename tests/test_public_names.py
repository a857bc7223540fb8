"""What `import stemtune` offers, and what it must not cost."""

import subprocess
import sys

import stemtune as st

PUBLIC = [
    "Config",
    "Sequence",
    "StemtuneError",
    "Trainer",
    "build_tree",
    "load_config",
    "load_model",
    "load_stages",
    "target_logprobs",
    "train",
]


def test_the_list_is_frozen() -> None:
    """Whoever changes it changes what users rely on."""
    assert st.__all__ == PUBLIC


def test_every_name_is_there() -> None:
    for name in PUBLIC:
        assert callable(getattr(st, name))
    star: dict[str, object] = {}
    exec("from stemtune import *", star)
    assert set(PUBLIC) <= star.keys()


def test_no_other_name() -> None:
    assert not hasattr(st, "no_such_name")


def test_import_is_light() -> None:
    code = (
        "import sys, stemtune; stemtune.load_config; stemtune.StemtuneError;"
        "print(*({'torch', 'transformers', 'numpy', 'peft', 'accelerate'} & sys.modules.keys()))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stdout.strip(), result.stderr) == (0, "", "")
