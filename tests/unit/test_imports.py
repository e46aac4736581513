"""Light imports: what they leave out, that the models are the stock ones all the same, and that nothing hides."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.torch  # in processes of its own
ROOT = Path(__file__).parents[2]
HEAVY = ("torch._dynamo", "torch.distributed.tensor", "scipy", "sympy", "peft", "torchvision")

SCRIPT = """
import json, sys, torch
from stages.models.checkpoint import construct
from stages.memory.imports import light_imports
config = json.loads(sys.argv[1])
model = construct(config.pop("class"), config)
loaded = [name for name in json.loads(sys.argv[2]) if sys.modules.get(name) is not None]
hidden = [name for name, module in sys.modules.items() if module is None]
print(json.dumps({"loaded": loaded, "hidden": hidden, "available": torch.distributed.is_available()}))
import torch._dynamo.utils, scipy.stats
assert torch._dynamo.is_compiling() is False
compiled = torch.compile(lambda x: x + 1, backend="eager")
assert float(compiled(torch.ones(()))) == 2
print(json.dumps(sorted(str(p.device) for p in model.parameters())[-1]))
"""

TEXT = {
    "class": "CLIPTextModel",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 100,
}
UNET = {
    "class": "UNet2DConditionModel",
    "_class_name": "UNet2DConditionModel",
    "block_out_channels": [32, 64],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "cross_attention_dim": 32,
    "attention_head_dim": 8,
}


@pytest.mark.parametrize("config", [TEXT, UNET], ids=lambda config: config["class"])
def test_models_come_without_the_compiler_and_leave_nothing_hidden(config):
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(config), json.dumps(HEAVY)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    state, device = (json.loads(line) for line in run.stdout.splitlines())
    assert state["loaded"] == []
    assert not set(state["hidden"]) & {*HEAVY, "transformers"}
    assert state["available"]
    assert device == "meta"
