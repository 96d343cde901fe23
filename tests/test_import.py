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

    def test_import_loads_no_compiler(self):
        """Nor anything else beyond torch; a training step does not load the compiler and its algebra either."""
        code = """
import sys, torch
before = set(sys.modules)
import overtone
loaded = set(sys.modules) - before
logits = torch.zeros(2, 3, requires_grad=True)
overtone.overtone_loss(logits, torch.tensor([0, 1]), hold="settled").backward()
overtone.linear_overtone_loss(logits, torch.eye(3), torch.tensor([0, 1])).backward()
heavy = [name for name in sys.modules if name.partition(".")[0] in ("sympy", "mpmath", "cProfile")]
print(heavy, [name for name in loaded if not name.startswith("overtone")])
"""
        result = run(code)
        assert result.stdout.strip() == "[] []", result.stdout + result.stderr
