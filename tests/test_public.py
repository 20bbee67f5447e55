"""The public names: one list, all of them importable, and importing the package costs nothing."""

from __future__ import annotations

import subprocess
import sys

import sapwood


def test_every_public_name_exists():
    assert set(sapwood.__all__) == set(sapwood._HOME_OF)
    for name in sapwood.__all__:
        assert getattr(sapwood, name) is not None
    assert dir(sapwood) == sapwood.__all__


def test_importing_sapwood_imports_no_torch():
    code = "import sapwood, sys; sapwood.Task; print('torch' in sys.modules, 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_no_module_of_ours_lets_bitsandbytes_give_advice():
    # Opened first, each of these imports PEFT, and with it bitsandbytes, before sapwood.models.
    code = "import sapwood.engines.local, sapwood.tree.attention"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""
