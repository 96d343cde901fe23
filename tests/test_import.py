"""The core stands on torch alone."""

import subprocess
import sys

HIDDEN = ["transformers", "peft", "accelerate", "trl", "scipy", "matplotlib", "rich", "platformdirs", "easyeditor"]


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


class TestImport:
    def test_core_needs_torch_alone(self):
        """With every optional package out of reach the import and the loss work, and the command shows its help."""
        code = f"""
import sys
sys.modules.update(dict.fromkeys({HIDDEN!r}))
import torch, overtone
overtone.OverToneLoss()(torch.zeros(2, 3, requires_grad=True), torch.tensor([0, 1])).backward()
from overtone.cli import main
try:
    main(["--help"])
except SystemExit as exit:
    assert not exit.code
"""
        result = run(code)
        assert result.returncode == 0, result.stderr
        assert "demo" in result.stdout

    def test_import_pulls_in_nothing_optional(self):
        """import overtone loads none of the packages that its adapters use."""
        result = run(f"import sys, torch, overtone; print([name for name in {HIDDEN!r} if name in sys.modules])")
        assert result.stdout.strip() == "[]", result.stdout + result.stderr
