"""What a checkpoint refuses, and which of its files it takes."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks import random_checkpoint
from stages.config import ROOT
from stages.families.schedules import make_scheduler
from stages.families.sd import FAMILY
from stages.memory.layout import Layout
from stages.memory.source import CheckpointSource
from stages.memory.tensors import read_tensor
from stages.models import locate
from stages.models.checkpoint import Checkpoint, CheckpointError
from stages.models.locate import Weights, choose_weights
from stages.models.single_file import relocate
from stages.paths import is_hub_id


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("made")
    random_checkpoint.main(["sd15", str(path), "--layout", "both", "--small"])
    return path


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return shutil.copytree(made, tmp_path / "checkpoint")


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_one_file_goes_before_shards_and_fp16_before_both() -> None:
    plain, shard = "unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model-00001-of-00001.safetensors"
    index, half = f"{plain}.index.json", "unet/diffusion_pytorch_model.fp16.safetensors"
    half_shard = "unet/diffusion_pytorch_model.fp16-00001-of-00001.safetensors"
    half_index = "unet/diffusion_pytorch_model.safetensors.index.fp16.json"
    names = {"unet/config.json", plain, shard, index, half, half_index, half_shard}
    assert choose_weights(names, "unet") == Weights(half)
    assert choose_weights(names, "unet", "") == Weights(plain)
    assert choose_weights(names - {half}, "unet") == Weights(half_index, (half_shard,))
    assert choose_weights({index, shard, half_shard}, "unet") == Weights(index, (shard,))


def test_weights_of_another_component_are_not_taken() -> None:
    with pytest.raises(CheckpointError, match=r"text_encoder: no weights; expected text_encoder/model\[.fp16\]"):
        choose_weights({"text_encoder_2/model.safetensors", "unet/model.safetensors"}, "text_encoder")


def test_pickles_are_refused_with_the_way_out() -> None:
    for name in ("model.ckpt", "org/model.PT", "x.bin", "x.pth"):
        with pytest.raises(CheckpointError, match=r"can run code(.|\n)*save_pretrained\('converted'\)"):
            Checkpoint.open(name)
    with pytest.raises(CheckpointError, match=r"only pickle files \(unet/diffusion_pytorch_model.bin\)"):
        choose_weights({"unet/diffusion_pytorch_model.bin"}, "unet")


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist; expected a diffusers folder, a hub id"):
        Checkpoint.open(str(tmp_path / "nowhere"))
    with pytest.raises(CheckpointError, match=r"not a diffusers folder: .* got an empty folder"):
        Checkpoint.open(str(tmp_path))
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(CheckpointError, match=r"expected a folder, a \.safetensors or a \.gguf file"):
        Checkpoint.open(str(tmp_path / "notes.txt"))


def test_inpainting_is_refused(folder: Path) -> None:
    edit(folder / "unet" / "config.json", in_channels=9)
    with pytest.raises(CheckpointError, match=r"unet: got 9 channels in .*inpainting"):
        FAMILY.check(Checkpoint.open(str(folder)), ("unet", "vae", "text_encoder"))
    weights = load_file(folder / "sd15.safetensors")
    weights["model.diffusion_model.input_blocks.0.0.weight"] = torch.zeros(16, 9, 3, 3)
    save_file(weights, folder / "inpainting.safetensors")
    with pytest.raises(CheckpointError, match=r"takes 9 channels .*inpainting"):
        Checkpoint.open(str(folder / "inpainting.safetensors"))


def test_names_and_shapes_that_do_not_fit_are_listed(folder: Path) -> None:
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    del weights["conv_in.bias"]
    weights |= {"extra.weight": torch.zeros(1), "conv_out.bias": torch.zeros(7)}
    save_file(weights, path)
    component = Checkpoint.open(str(folder)).component("unet")
    with pytest.raises(CheckpointError) as error:
        component.build()
    for part in ("1 missing (conv_in.bias)", "1 unexpected (extra.weight)", "conv_out.bias: file [7], model [4]"):
        assert part in str(error.value)


def test_a_part_that_is_not_needed_may_be_missing(folder: Path) -> None:
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({k: v for k, v in load_file(path).items() if not k.startswith(("encoder.", "quant_conv."))}, path)
    component = Checkpoint.open(str(folder)).component("vae")
    component.build(optional=("encoder.", "quant_conv."))
    with pytest.raises(CheckpointError, match=r"missing \(encoder\.conv_in\.weight"):
        component.build()


def test_built_models_hold_no_memory(made: Path) -> None:
    for name in ("unet", "vae", "text_encoder"):
        model = Checkpoint.open(str(made)).component(name).build()
        assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert not model.training
        assert all(buffer.device.type == "cpu" for buffer in model.buffers())


def test_small_single_file_needs_its_configs(made: Path) -> None:
    checkpoint = Checkpoint.open(str(made / "sd15.safetensors"))
    with pytest.raises(CheckpointError, match=r"of another shape(.|\n)*model\.config=DIR"):
        checkpoint.component("unet").build()


def test_single_file_of_another_kind(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="no denoiser in it"):
        Checkpoint.open(str(folder / "unet" / "diffusion_pytorch_model.safetensors"))
    with pytest.raises(CheckpointError, match=r"model\.config: got 'nowhere'"):
        Checkpoint.open(str(folder / "sd15.safetensors"), config="nowhere")


def test_prediction_type_can_be_given(made: Path) -> None:
    assert Checkpoint.open(str(made)).scheduler_config()[1]["prediction_type"] == "epsilon"
    given = Checkpoint.open(str(made / "sd15.safetensors"), prediction_type="v_prediction").scheduler_config()
    assert given[0] == "PNDMScheduler"
    assert given[1]["prediction_type"] == "v_prediction"


def test_torn_file(folder: Path) -> None:
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"torn|not a whole"):
        Checkpoint.open(str(folder)).component("unet")


def test_missing_shard(folder: Path) -> None:
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    path.unlink()
    index = {"weight_map": {"decoder.conv_in.weight": "diffusion_pytorch_model-00001-of-00002.safetensors"}}
    path.with_name(f"{path.name}.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"00001-of-00002.safetensors: missing, but named by vae/"):
        Checkpoint.open(str(folder)).component("vae")


def test_a_tensor_that_is_no_piece_of_the_file_is_refused(made: Path) -> None:
    refs = Checkpoint.open(str(made)).component("unet").tensors
    name = "time_embedding.linear_1.weight"
    for change in (lambda tensor: tensor[:, 1:].t(), lambda tensor: tensor + 1, lambda tensor: tensor[:, 1:]):
        with pytest.raises(CheckpointError, match="not made of whole pieces"):
            relocate(refs, lambda tensors, change=change: {"x": change(tensors[name])}, made)
    rows = relocate(refs, lambda tensors: {"x": tensors[name][3:5].clone()}, made)["x"]
    assert torch.equal(read_tensor(rows), read_tensor(refs[name])[3:5])


def test_hub_id_from_the_cache(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A snapshot in the cache that has the asked components is used without the network; its revision is known."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--some--model"
    shutil.copytree(made, repository / "snapshots" / commit, ignore=shutil.ignore_patterns("vae"))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    checkpoint = Checkpoint.open("some/model", components=("unet", "tokenizer"))
    assert checkpoint.revision == commit
    checkpoint.component("unet").build()
    with pytest.raises(CheckpointError, match=r"model\.path=some/model: not in the local cache"):
        Checkpoint.open("some/model", components=("unet", "vae"))


def test_a_folder_is_never_taken_for_a_hub_id(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(made.parent)
    (made.parent / "org").mkdir(exist_ok=True)
    assert is_hub_id("org/name")
    (made.parent / "org" / "name").mkdir(exist_ok=True)
    assert not is_hub_id("org/name")
    assert not is_hub_id("a/b/c")
    assert Checkpoint.open(str(made)).revision is None


def test_only_what_is_needed_is_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import LocalEntryNotFoundError
    from huggingface_hub.file_download import DryRunFileInfo

    there = ("unet/diffusion_pytorch_model", "unet/diffusion_pytorch_model.fp16", "vae/diffusion_pytorch_model.fp16")
    asked: list[dict[str, object]] = []

    def snapshot_download(repo_id: str, **options: object) -> object:
        if options.get("local_files_only"):
            raise LocalEntryNotFoundError("empty cache")
        if options.get("dry_run"):
            names = [f"{name}.{kind}" for name in there for kind in ("safetensors", "bin")]
            return [DryRunFileInfo("c", 2_000_000_000, name, "", False, True) for name in names]
        asked.append(options)
        return "folder"

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    notes: list[str] = []
    assert locate.fetch("some/model", ["unet", "scheduler"], revision="v1", note=notes.append) == Path("folder")
    assert notes == ["downloading some/model: 1 files, 2.00 GB"]
    patterns = ["*.json", "*.txt", "*.model", "unet/diffusion_pytorch_model.fp16.safetensors"]
    assert [(options["allow_patterns"], options["revision"]) for options in asked] == [(patterns, "v1")]


@pytest.mark.parametrize("name", ["MODEL.SAFETENSORS", "model.sft", "blob-of-the-hub's-cache"])
def test_endings_of_a_single_file(made: Path, tmp_path: Path, name: str) -> None:
    shutil.copy(made / "sd15.safetensors", tmp_path / name)
    (tmp_path / "linked.safetensors").symlink_to(name)
    for path in (tmp_path / name, tmp_path / "linked.safetensors"):
        assert Checkpoint.open(str(path)).component("vae").tensors


def sharded(folder: Path, **index: object) -> Path:
    """The VAE's weights as one shard, with an index of what is given."""
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    path.rename(path.with_name("diffusion_pytorch_model-00001-of-00001.safetensors"))
    path.with_name(f"{path.name}.index.json").write_text(json.dumps(index))
    return path.with_name("diffusion_pytorch_model-00001-of-00001.safetensors")


@pytest.mark.parametrize("place", ["../unet/x.safetensors", "/tmp/x.safetensors", "x\\..\\y.safetensors", "x.bin", 3])
def test_a_shard_that_lies_elsewhere_is_refused(folder: Path, place: object) -> None:
    sharded(folder, weight_map={"decoder.conv_in.weight": place})
    with pytest.raises(CheckpointError, match=r"index\.json: got the file .* in the same folder"):
        Checkpoint.open(str(folder)).component("vae")


def test_a_shard_may_be_a_link_as_in_the_hubs_cache(folder: Path, tmp_path: Path) -> None:
    names = list(load_file(folder / "vae" / "diffusion_pytorch_model.safetensors"))
    shard = sharded(folder, weight_map=dict.fromkeys(names, "diffusion_pytorch_model-00001-of-00001.safetensors"))
    shard.rename(tmp_path / "blob")
    shard.symlink_to(tmp_path / "blob")
    assert set(Checkpoint.open(str(folder)).component("vae").tensors) == set(names)


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ({}, "expected a weight_map of tensors to files, got none"),
        ({"weight_map": {}}, "expected a weight_map"),
        ({"weight_map": ["a"]}, "expected a weight_map"),
        ({"weight_map": {"lost": "diffusion_pytorch_model-00001-of-00001.safetensors"}}, "names lost, in none of its"),
    ],
)
def test_an_index_of_another_shape(folder: Path, index: dict, said: str) -> None:
    sharded(folder, **index)
    with pytest.raises(CheckpointError, match=rf"index\.json: {said}"):
        Checkpoint.open(str(folder)).component("vae")


@pytest.mark.parametrize("text", ["[]", "null", '"x"', "[" * 100_000])
def test_a_config_that_is_no_object(folder: Path, text: str) -> None:
    (folder / "vae" / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"vae/config\.json: (expected a JSON object|not JSON)"):
        Checkpoint.open(str(folder)).component("vae")


@pytest.mark.parametrize(
    ("component", "changes"),
    [
        ("vae", {"norm_num_groups": 5}),
        ("text_encoder", {"hidden_act": "nonsense"}),
        ("unet", {"block_out_channels": []}),
    ],
)
def test_a_config_that_makes_no_model_is_said_in_words(folder: Path, component: str, changes: dict) -> None:
    edit(folder / component / "config.json", **changes)
    with pytest.raises(CheckpointError, match=r"cannot be made from its config \(\w+: .*Download it again"):
        Checkpoint.open(str(folder)).component(component)


@pytest.mark.parametrize(
    ("component", "changes", "said"),
    [
        ("vae", {"scaling_factor": float("nan")}, "not JSON .NaN is no number"),
        ("text_encoder", {"num_hidden_layers": 1_000_000}, "got num_hidden_layers=1000000, expected at most 1000"),
        ("unet", {"layers_per_block": [1, 10**9]}, "got layers_per_block=.1, 1000000000., expected at most 1000"),
    ],
)
def test_numbers_that_no_config_has(folder: Path, component: str, changes: dict, said: str) -> None:
    edit(folder / component / "config.json", **changes)
    with pytest.raises(CheckpointError, match=said):
        Checkpoint.open(str(folder)).component(component)


def test_infinities_stand_in_published_configs(folder: Path) -> None:
    edit(folder / "scheduler" / "scheduler_config.json", lambda_min_clipped=-float("inf"))
    assert Checkpoint.open(str(folder)).scheduler_config()[1]["lambda_min_clipped"] == -float("inf")


@pytest.mark.parametrize("value", [0, float("inf"), "x"])
def test_a_scale_that_no_latents_have(folder: Path, value: object) -> None:
    edit(folder / "vae" / "config.json", scaling_factor=value)
    said = FAMILY.refuse(Checkpoint.open(str(folder)), ("text_encoder", "unet", "vae"))
    assert said is not None and "vae: got scaling_factor" in said
    edit(folder / "vae" / "config.json", scaling_factor=1.0, shift_factor=value)
    said = FAMILY.refuse(Checkpoint.open(str(folder)), ("text_encoder", "unet", "vae"))
    assert value == 0 or (said is not None and "vae: got shift_factor" in said)


@pytest.mark.parametrize("text", ["", "{", "null", '"x"'])
def test_a_vocabulary_of_another_shape_is_refused(folder: Path, text: str) -> None:
    (folder / "tokenizer" / "vocab.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"tokenizer: .*Download the checkpoint again"):
        Checkpoint.open(str(folder)).tokenizer()


def test_weights_that_link_nowhere(folder: Path) -> None:
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    file.unlink()
    file.symlink_to("/nowhere")
    with pytest.raises(CheckpointError, match=r"a link to /nowhere\): missing"):
        Checkpoint.open(str(folder)).component("vae")


def test_weights_that_are_no_file(folder: Path) -> None:
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    file.unlink()
    file.mkdir()
    with pytest.raises(ValueError, match=r"got a folder, a pipe or a device"):
        Checkpoint.open(str(folder)).component("vae")


def test_no_class_but_those_that_families_know_is_made(folder: Path) -> None:
    for name, said in (("unet", "Transformer2DModel"), ("vae", "AutoencoderTiny"), ("text_encoder", "PreTrainedModel")):
        edit(folder / "model_index.json", **{name: ["diffusers", said]})
        with pytest.raises(CheckpointError, match=rf"{name}: got a '{said}', expected .*: no other class is made here"):
            Checkpoint.open(str(folder)).component(name)
    for said in ("UNet2DConditionModel", "SchedulerMixin.from_config", "KarrasDiffusionSchedulers", "utils", "nope"):
        edit(folder / "scheduler" / "scheduler_config.json", _class_name=said)
        with pytest.raises(ValueError, match=rf"scheduler.class_name: got '{said}', expected a scheduler class"):
            make_scheduler(Checkpoint.open(str(folder)), None, {})


def test_a_class_may_be_named_in_one_place_only(folder: Path) -> None:
    """As for stock pipelines, which go by ``model_index.json``; without it, the only class that is known."""
    for file in ("unet/config.json", "vae/config.json", "text_encoder/config.json", "scheduler/scheduler_config.json"):
        told = json.loads((folder / file).read_text())
        (folder / file).write_text(
            json.dumps({k: v for k, v in told.items() if k not in ("_class_name", "architectures")})
        )
    for _ in range(2):
        checkpoint = Checkpoint.open(str(folder))
        for name in ("unet", "vae", "text_encoder"):
            checkpoint.component(name).build()
        if (folder / "model_index.json").exists():
            assert type(make_scheduler(checkpoint, None, {})).__name__ == checkpoint.scheduler_config()[0] != ""
            (folder / "model_index.json").unlink()
    assert type(make_scheduler(checkpoint, "DDIMScheduler", {})).__name__ == "DDIMScheduler"
    with pytest.raises(ValueError, match="scheduler=NAME chooses"):
        make_scheduler(checkpoint, None, {})


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "_attn_implementation_internal"])
def test_no_attention_comes_from_the_hub(folder: Path, key: str) -> None:
    edit(folder / "text_encoder" / "config.json", **{key: "kernels-community/anything"})
    model = Checkpoint.open(str(folder)).component("text_encoder").build()
    assert model.config._attn_implementation == "sdpa"


@pytest.fixture
def worded(folder: Path) -> Path:
    """With the tokenizer of the embedded model, as slow tokenizers are saved."""
    shutil.rmtree(folder / "tokenizer", ignore_errors=True)
    shutil.copytree(ROOT / "models" / "embedded" / "tokenizer", folder / "tokenizer")
    return folder


def test_a_tokenizer_without_a_vocabulary_is_refused(worded: Path) -> None:
    assert Checkpoint.open(str(worded)).tokenizer()("a lighthouse").input_ids
    for file in ("vocab.json", "merges.txt", "tokenizer.json"):
        (worded / "tokenizer" / file).unlink(missing_ok=True)
    with pytest.raises(CheckpointError, match=r"tokenizer: no vocabulary in it .* got .*tokenizer_config\.json"):
        Checkpoint.open(str(worded)).tokenizer()
    (worded / "tokenizer" / "vocab.json").write_text("{}")
    (worded / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(CheckpointError, match="its vocabulary is empty"):
        Checkpoint.open(str(worded)).tokenizer()


def test_as_many_tokens_as_the_text_encoder_has_positions(worded: Path) -> None:
    file = worded / "tokenizer" / "tokenizer_config.json"
    told = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in told.items() if key != "model_max_length"}))
    assert Checkpoint.open(str(worded)).tokenizer().model_max_length == 77
    edit(worded / "text_encoder" / "config.json", max_position_embeddings=32)
    assert Checkpoint.open(str(worded)).tokenizer().model_max_length == 32
    edit(file, model_max_length=1024)
    with pytest.raises(CheckpointError, match="1024 tokens, expected at most the 32 positions"):
        Checkpoint.open(str(worded)).tokenizer()


def test_the_text_half_of_a_whole_clip_config(folder: Path) -> None:
    file = folder / "text_encoder" / "config.json"
    told = json.loads(file.read_text())
    whole = {"model_type": "clip", "architectures": ["CLIPModel"], "text_config": told, "vision_config": {}}
    file.write_text(json.dumps(whole))
    component = Checkpoint.open(str(folder)).component("text_encoder")
    assert component.build().config.hidden_size == told["hidden_size"]


def test_a_whole_clip_is_a_text_encoder(folder: Path) -> None:
    path = folder / "text_encoder" / "model.safetensors"
    others = {"logit_scale": torch.ones(()), "text_projection.weight": torch.ones(2, 2)}
    others |= {"vision_model.embeddings.class_embedding": torch.ones(3), "visual_projection.weight": torch.ones(2)}
    save_file(load_file(path) | others, path)
    model = Checkpoint.open(str(folder)).component("text_encoder").build()
    assert not any(name.startswith(tuple(others)) for name in model.state_dict())


def test_weights_in_float8_are_read(folder: Path) -> None:
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["conv_in.weight"] = weights["conv_in.weight"].to(torch.float8_e4m3fn)
    save_file(weights, path)
    component = Checkpoint.open(str(folder)).component("unet")
    component.build()
    layout = Layout(component.build(), torch.bfloat16, channels_last=True)
    source, slot = CheckpointSource(component.tensors), layout.slots["conv_in.weight"]
    packed = torch.zeros(layout.nbytes, dtype=torch.uint8)
    source.read([slot], 0, packed)
    source.close()
    assert torch.equal(slot.view(packed, 0), weights["conv_in.weight"].to(torch.bfloat16))
