"""Pushing to the hub and loading from it, on a hub that is a folder (`conftest.Hub`)."""

import pytest
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

import qjax
from qjax import api, zoo
from qjax.core.serialize import params_digest
from qjax.models import hub as ours

MODEL = "fashion-dit"
REPOSITORY = "somebody/a-model"
# What the HTTP client of huggingface_hub raises itself: httpx's, or that of requests.
CLIENT_ERROR = next(
    base
    for base in HfHubHTTPError.__mro__
    if base.__name__ in ("HTTPError", "RequestException")
    and not base.__module__.startswith("huggingface_hub")
)
SAVED = ["README.md", "model.safetensors", "qjax.json"]


@pytest.fixture(scope="module")
def quantized():
    return qjax.quantize(qjax.load(MODEL), qjax.recipes.w8a8())


def test_a_pushed_model_comes_back_bit_for_bit(hub, quantized, tmp_path):
    address = quantized.push_to_hub(REPOSITORY)
    assert address.endswith(f"{REPOSITORY}/commit/1")
    loaded = qjax.load(REPOSITORY)
    assert params_digest(loaded.params) == params_digest(quantized.params)
    loaded.save(tmp_path / "again")
    for name in ("model.safetensors", "qjax.json"):
        there = (hub.files(REPOSITORY) / name).read_bytes()
        assert (tmp_path / "again" / name).read_bytes() == there, name


def test_nothing_but_the_files_of_the_save_is_uploaded(hub, quantized):
    quantized.push_to_hub(REPOSITORY)
    (upload,) = hub.asked("upload_folder")
    assert upload["names"] == SAVED


def test_what_a_repository_has_already_stays(hub, quantized):
    hub.files(REPOSITORY).mkdir(parents=True)
    (hub.files(REPOSITORY) / "sample.png").write_bytes(b"picture")
    quantized.push_to_hub(REPOSITORY)
    assert (hub.files(REPOSITORY) / "sample.png").read_bytes() == b"picture"


@pytest.mark.parametrize("private", [True, False, None])
def test_token_privacy_branch_and_message_are_passed_on(hub, quantized, private):
    quantized.push_to_hub(
        REPOSITORY, private=private, token="hf_x", revision="w4a8", commit_message="Four bits"
    )
    assert hub.asked("HfApi") == [{"token": "hf_x"}]
    assert hub.asked("create_repo") == [{"repository": REPOSITORY, "private": private}]
    assert hub.asked("create_branch") == [{"repository": REPOSITORY, "branch": "w4a8"}]
    (upload,) = hub.asked("upload_folder")
    assert (upload["revision"], upload["message"]) == ("w4a8", "Four bits")


def test_the_card_on_the_hub_loads_from_there(hub, quantized):
    quantized.push_to_hub(REPOSITORY)
    card = (hub.files(REPOSITORY) / "README.md").read_text()
    assert f'qjax.load("{REPOSITORY}")' in card


def test_the_command_says_that_it_uploads_when_the_id_and_the_model_are_good(hub, run):
    for words in (("fashion-dit", "just-a-name"), ("fashion-dit", f"{REPOSITORY}@v1")):
        done = run("push", *words)
        assert (done.status, "owner/name" in done.err) == (2, True), done
        assert "uploading" not in done.err
    done = run("push", "no-such-model", REPOSITORY)
    assert done.status == 2 and "uploading" not in done.err
    assert not hub.asked("upload_folder")


def test_a_name_that_is_no_id_is_refused_before_anything_is_sent(hub, quantized):
    with pytest.raises(ValueError, match="owner/name, .*; got 'just-a-name'"):
        quantized.push_to_hub("just-a-name")
    assert hub.calls == []


@pytest.mark.parametrize(
    "error",
    [
        OSError("no network\nat all"),
        CLIENT_ERROR("Name or service not known"),
        OfflineModeIsEnabled("offline mode is on"),
    ],
    ids=["os", "http", "offline"],
)
def test_without_a_connection_both_ways_say_how_to_go_on(hub, quantized, error):
    hub.error = error
    with pytest.raises(OSError, match="hf auth login.*save to a folder") as pushed:
        quantized.push_to_hub(REPOSITORY)
    with pytest.raises(FileNotFoundError, match="downloaded before is read from the cache") as got:
        qjax.load(REPOSITORY)
    assert all("\n" not in str(one.value) for one in (pushed, got))


@pytest.mark.parametrize(
    ("name", "words"), [(REPOSITORY, {"revision": "v1"}), (f"{REPOSITORY}@v1", {})]
)
def test_a_revision_is_passed_on_and_the_weights_are_of_the_commit_looked_at(
    hub, quantized, name, words
):
    quantized.push_to_hub(REPOSITORY, revision="v1")
    loaded = qjax.load(name, **words)
    assert params_digest(loaded.params) == params_digest(quantized.params)
    assert hub.asked("snapshot_download")[0]["revision"] == "v1"


def test_the_second_download_is_pinned_to_the_commit_of_the_first(hub, quantized):
    quantized.push_to_hub(REPOSITORY)
    api.locate(REPOSITORY)
    first, second = hub.asked("snapshot_download")
    (commit,) = (path.name for path in (hub.folder / "cache" / REPOSITORY).iterdir())
    assert (first["revision"], second["revision"]) == (None, commit)


def test_two_revisions_are_refused(hub):
    with pytest.raises(ValueError, match="names a revision"):
        qjax.load(f"{REPOSITORY}@v1", revision="v2")


def test_a_revision_of_what_is_not_on_the_hub_is_refused():
    with pytest.raises(ValueError, match="revision is for repositories of the hub"):
        qjax.load(MODEL, revision="v1")


def put(hub, files):
    for name, data in files.items():
        place = hub.files(REPOSITORY) / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(data)


def test_a_diffusers_repository_loads_without_its_pickles(hub):
    folder = zoo.FOLDER / MODEL
    put(hub, {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.*")})
    pickles = ("transformer/diffusion_pytorch_model.bin", "model.ckpt", "a.pt", "b.pkl", "run.py")
    put(hub, dict.fromkeys(pickles, b"pickle"))
    put(hub, {"README.md": b"---\nlicense: mit\n---\n# A model\n"})
    loaded = qjax.load(REPOSITORY)
    assert (loaded.source.name, loaded.source.license) == (REPOSITORY, "mit")
    names = {p.name for p in (hub.folder / "cache").rglob("*") if p.is_file()}
    assert "diffusion_pytorch_model.safetensors" in names
    assert names.isdisjoint({name.rpartition("/")[2] for name in pickles})


def repository_of(hub, name, rename=lambda path: path):
    folder = zoo.FOLDER / name
    files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.*")}
    put(hub, {rename(path): data for path, data in files.items()})


def fetched(hub):
    cache = hub.folder / "cache" / REPOSITORY
    return {"/".join(p.relative_to(cache).parts[1:]) for p in cache.rglob("*.safetensors")}


def test_of_a_diffusers_repository_the_weights_that_are_read_are_fetched_and_no_others(hub):
    repository_of(hub, "fashion-ldm")
    unread = (
        "v1-5-pruned.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_pytorch_model.non_ema.safetensors",
        "vae/diffusion_pytorch_model.fp16-00001-of-00002.safetensors",
        "safety_checker/model.safetensors",
        "onnx/unet/model.safetensors",
    )
    put(hub, dict.fromkeys(unread, b"many bytes") | {"safety_checker/config.json": b"{}"})
    same = qjax.load("fashion-ldm")
    assert params_digest(qjax.load(REPOSITORY).params) == params_digest(same.params)
    assert fetched(hub).isdisjoint(unread) and len(fetched(hub)) == 3


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_weights_in_fp16_are_fetched_where_they_are_asked_for_or_alone(hub, variant):
    half = lambda path: path.replace(".safetensors", ".fp16.safetensors")
    repository_of(hub, "fashion-ldm", half)
    plain = {"unet/diffusion_pytorch_model.safetensors": b"many bytes"} if variant else {}
    put(hub, plain)
    loaded = qjax.load(REPOSITORY, variant=variant)
    assert params_digest(loaded.params) == params_digest(qjax.load("fashion-ldm").params)
    assert all(".fp16." in name for name in fetched(hub)) and len(fetched(hub)) == 3


def test_a_repository_of_neither_layout_is_refused_by_name_before_its_weights(hub):
    put(hub, {"config.json": b"{}", "model.safetensors": b"many bytes"})
    with pytest.raises(ValueError, match=f"{REPOSITORY} on the hub holds neither qjax.json"):
        qjax.load(REPOSITORY)
    assert not list((hub.folder / "cache").rglob("*.safetensors"))


def test_a_plan_of_a_repository_downloads_configs_alone(hub):
    folder = zoo.FOLDER / MODEL
    put(hub, {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.*")})
    api.shapes(REPOSITORY)
    assert not list((hub.folder / "cache").rglob("*.safetensors"))


@pytest.mark.parametrize(
    "name", ["a", "a/b/c", "../x", "/etc/x", "a/b@", "a/b@ c", "https://hub/a", "a\\b", "-a/ b"]
)
def test_what_is_no_id_is_not_taken_for_one(name):
    assert ours.split_revision(name) is None


def test_the_command_pushes_a_save_with_the_card_that_somebody_edited(
    hub, run, quantized, tmp_path
):
    quantized.save(tmp_path / "saved")
    card = tmp_path / "saved" / "README.md"
    card.write_text(card.read_text() + "\nMine.\n")
    done = run("push", tmp_path / "saved", REPOSITORY, "--private", "--message", "First")
    assert (done.status, REPOSITORY in done.out) == (0, True), done.err
    assert hub.asked("create_repo") == [{"repository": REPOSITORY, "private": True}]
    text = (hub.files(REPOSITORY) / "README.md").read_text()
    assert text.endswith("Mine.\n") and f'qjax.load("{REPOSITORY}")' in text
