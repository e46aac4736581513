"""Light imports: what they leave out, that the models are the stock ones all the same, and that nothing hides."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from stages.memory.imports import light_imports

pytestmark = pytest.mark.torch  # in processes of its own

ROOT = Path(__file__).parents[2]
HEAVY = ("torch._dynamo", "torch.distributed.tensor", "torch._meta_registrations", "scipy", "sympy", "peft")
HEAVY += ("torchvision", "requests", "gguf", "psutil")

SCRIPT = """
import json, sys
from stages.memory.imports import light_torch
with light_torch():
    import torch
from stages.models.component import construct
from stages.memory.imports import light_imports
config = json.loads(sys.argv[1])
model = construct(config.pop("class"), config)
loaded = [name for name in json.loads(sys.argv[2]) if hasattr(sys.modules.get(name), "__file__")]
hidden = [name for name, module in sys.modules.items() if module is None]
print(json.dumps({"loaded": loaded, "hidden": hidden, "available": torch.distributed.is_available()}))
import torch._dynamo.utils, scipy.stats, requests
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


LATER = """
import json, sys
from pathlib import Path
from stages.memory.imports import light_imports, light_torch, meta_kernels
with light_torch():
    import torch
from stages.models.component import construct
layers = ("num_layers", "num_single_layers", "num_hidden_layers", "n_layers", "n_refiner_layers")
made = set()
for file in sorted(Path("stages/models/configs").glob("*/*/config.json")):
    config = json.loads(file.read_text())
    config |= dict.fromkeys(config.keys() & set(layers), 1)
    name = config.get("_class_name") or config["architectures"][0]
    made |= {str(weight.device) for weight in construct(name, config).parameters()}
with torch.device("meta"):
    torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Conv2d(8, 8, 3), torch.nn.LayerNorm(8))
drawn = torch.randn(2, generator=torch.Generator().manual_seed(1))
loaded = [name for name in json.loads(sys.argv[1]) if hasattr(sys.modules.get(name), "__file__")]
print(json.dumps([sorted(made), loaded]))

from diffusers.utils import import_utils, loading_utils
assert import_utils._package_map["PIL"] == ["pillow"] and "no_such_module" not in import_utils._package_map
assert loading_utils.requests.codes.ok == 200 and sys.modules["requests"].codes is loading_utils.requests.codes
import diffusers, diffusers.models.unets, diffusers.models.transformers as transformers
assert diffusers.models.unets.unet_2d_condition.UNet2DConditionModel is diffusers.UNet2DConditionModel
assert transformers.FluxTransformer2DModel is diffusers.FluxTransformer2DModel
from diffusers.models.autoencoders import AutoencoderKL, AsymmetricAutoencoderKL
assert AutoencoderKL is diffusers.AutoencoderKL
assert torch.broadcast_shapes((2, 1), (3,)) == (2, 3)
import torch._decomp.decompositions
meta_kernels()
import torch._meta_registrations
conv = torch.nn.Conv2d(3, 4, 3, device="meta")
assert conv(torch.empty(1, 3, 8, 8, device="meta")).shape == (1, 4, 6, 6)
assert torch._meta_registrations is sys.modules["torch._meta_registrations"]
"""

BROKEN = """
import sys
sys.path.insert(0, sys.argv[1])
from stages.memory.imports import light_imports
try:
    with light_imports():
        with light_imports():
            import newer_release
except Exception as error:
    print(type(error).__name__, error)
else:
    print("imported")
"""


def run(script: str, *arguments: str, **environment: str) -> list[str]:
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    "config", [pytest.param(TEXT, marks=pytest.mark.slow, id=TEXT["class"]), pytest.param(UNET, id=UNET["class"])]
)
def test_models_come_without_the_compiler_and_leave_nothing_hidden(config):
    state, device = map(json.loads, run(SCRIPT, json.dumps(config), json.dumps(HEAVY), HIGHRES_LIGHT_IMPORTS="1"))
    assert state["loaded"] == []
    assert not set(state["hidden"]) & {*HEAVY, "transformers"}
    assert state["available"]
    assert device == "meta"


def test_stock_models_are_made_without_what_comes_at_its_first_use():
    later = ("torch._meta_registrations", "torch._refs", "torch._decomp", "requests", "diffusers.models.transformers")
    assert json.loads(run(LATER, json.dumps(later), HIGHRES_LIGHT_IMPORTS="1")[0]) == [["meta"], []]


@pytest.mark.slow
def test_switched_off_the_libraries_are_imported_whole():
    state, device = map(json.loads, run(SCRIPT, json.dumps(UNET), json.dumps(HEAVY), HIGHRES_LIGHT_IMPORTS="0"))
    assert {"torch._dynamo", "torch._meta_registrations", "scipy", "requests"} <= set(state["loaded"])
    assert state["hidden"] == []
    assert state["available"]
    assert device == "meta"


LAZY = """
try:
    import scipy.stats
except ImportError as error:
    raise RuntimeError("lazy") from error
"""
NEEDS = {
    "import scipy.stats": "ModuleNotFoundError",
    "import torch; torch._dynamo.graph_break": "AttributeError",
    LAZY: "RuntimeError",
}


@pytest.mark.parametrize("needs", list(NEEDS), ids=NEEDS.values())
def test_an_import_that_fails_says_that_there_is_a_switch(tmp_path, needs):
    (tmp_path / "newer_release.py").write_text(needs)
    (line,) = run(BROKEN, str(tmp_path), HIGHRES_LIGHT_IMPORTS="1")
    assert line.startswith(f"LightImportError {NEEDS[needs]}: ")
    assert "HIGHRES_LIGHT_IMPORTS=0" in line
    if needs == LAZY:  # each of them would; one is enough
        assert run(BROKEN, str(tmp_path), HIGHRES_LIGHT_IMPORTS="0") == ["imported"]


def test_other_errors_pass_as_they_are():
    with pytest.raises(AttributeError, match="no attribute 'x'"), light_imports():
        print(json.x)
