"""A path of the command line: a file, a folder, or a repository of the hub."""

from pathlib import Path

import pytest

from stages.config import ROOT, ConfigError, on_gpu
from stages.models.locate import CheckpointError, refuse_pickle
from stages.paths import PICKLES, anchored, is_hub_id, local_path
from stages.workflow.complete import complete


@pytest.mark.parametrize("path", ["org/name", "stable-diffusion-v1-5/stable-diffusion-v1-5", "a.b/c_d-1.5"])
def test_hub_ids(path: str) -> None:
    assert is_hub_id(path)


@pytest.mark.parametrize(
    "path",
    [
        *("models/foo.safetensors", "models/FOO.SAFETENSORS", "models/foo.sft", "models/foo.gguf", "x/y.ckpt"),
        *("./x/y", "../x/y", "~/x/y", "/x/y", "name", "a/b/c", "x/", "/x", "", "a b/c", "models/embedded"),
    ],
)
def test_what_names_a_file_or_a_folder_is_no_hub_id(path: str) -> None:
    assert not is_hub_id(path)


@pytest.mark.parametrize("path", ["models/foo.safetensors", "./x/y"])
def test_a_missing_local_file_is_refused_as_such(make_config, path: str) -> None:
    with pytest.raises(ConfigError, match=r"model\.path: got '.*/(foo\.safetensors|x/y)', expected a folder"):
        complete(make_config({"model.path": path}))


@pytest.mark.parametrize("ending", [*PICKLES, ".CKPT", ".Bin"])
def test_pickles_are_refused_on_every_floor(make_config, ending: str) -> None:
    with pytest.raises(ConfigError, match="Unpickling runs code"):
        complete(make_config({"model.path": f"model{ending}"}))
    with pytest.raises(CheckpointError, match="got a pickle file"):
        refuse_pickle(f"model{ending}")


def test_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert anchored("here") == ROOT / "here" and anchored("here", near=True) == tmp_path / "here"
    assert anchored("nowhere", near=True) == ROOT / "nowhere" and anchored("/x") == Path("/x")
    assert local_path("here") == tmp_path / "here" and local_path("conf") == ROOT / "conf"
    assert local_path("nowhere") is None


def test_what_computes_on_a_gpu(make_config) -> None:
    assert on_gpu(make_config({"device": "cuda"})) and on_gpu(make_config({"device": "cuda:1"}))
    assert not on_gpu(make_config())
