"""Nothing runs code from a file, no secret is stored or shown, nothing fetched leaves its folder."""

import argparse
import ast
import functools
import http.server
import pickle
import re
import threading
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch

import sample_ddp
import train_mask_adan
from data.codec import load_codec
from evaluations import evaluator, reference
from runtime import fetch as fetching
from runtime.fetch import fetch
from runtime.redact import redact, redact_values
from tests.launch import ROOT
from tests.runs import train_argv
from tests.sit_checkpoints import random_checkpoint
from tests.test_bad_input import Malicious

# What runs code from data, a shell, or takes a name that another program may take first; and what unpacks archives.
FORBIDDEN = (
    "pickle.load", "pickle.loads", "pickle.Unpickler", "dill.load", "joblib.load", "marshal.loads", "yaml.load",
    "yaml.unsafe_load", "torch.hub.load", "torch.hub.load_state_dict_from_url", "eval", "exec", "os.system", "os.popen",
    "tempfile.mktemp", "shutil.unpack_archive", "tarfile.open", "shelve.open",
)  # fmt: skip
UNPACKING = ("extractall", "extract")  # of zip and tar files; tensors have neither
SECRETS = ("s3cret-pass", "t0ken-value")
URL = "https://user:s3cret-pass@host.invalid/a.pt?token=t0ken-value"


def sources() -> list[Path]:
    ours = ("benchmarks", "data", "diffusion", "evaluations", "examples", "models", "runtime", "sampling", "training")
    scripts = ("attention_mediator", "time_step_wise_adjusting")
    return [*ROOT.glob("*.py"), *(path for folder in (*ours, *scripts) for path in (ROOT / folder).rglob("*.py"))]


def calls(tree: ast.AST):
    """(dotted name, keywords with constant values) of every call."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            constants = {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
            yield ast.unparse(node.func), constants


def faults(text: str) -> list[str]:
    found = []
    for name, constants in calls(ast.parse(text)):
        if name in FORBIDDEN or ("." in name and name.rpartition(".")[2] in UNPACKING and "archive" in name):
            found.append(name)
        if name == "torch.load" and constants.get("weights_only") is not True:
            found.append("torch.load without weights_only=True")
        if constants.get("allow_pickle") or constants.get("trust_remote_code") or constants.get("shell"):
            found.append(f"{name}({constants})")
    return found


def test_no_call_runs_code_from_a_file():
    files = sources()
    assert len(files) > 80
    assert {str(path.relative_to(ROOT)): faults(path.read_text()) for path in files if faults(path.read_text())} == {}
    runs_scripts = [
        path.name for path in files if any(name == "torch.jit.load" for name, _ in calls(ast.parse(path.read_text())))
    ]
    assert runs_scripts == ["backbones.py"]  # TorchScript is a program; its flag's help says so


@pytest.mark.parametrize(
    "text",
    [
        "torch.load(path)", "torch.load(path, weights_only=False)", "pickle.loads(data)", "np.load(path, allow_pickle=True)",
        "eval(text)", "archive.extractall(folder)", "subprocess.run(text, shell=True)", "tempfile.mktemp()",
    ],
)  # fmt: skip
def test_the_search_finds_what_it_looks_for(text):
    assert faults(text)


@pytest.mark.parametrize("module", [evaluator, reference])
def test_help_says_that_torchscript_is_a_program(module, capsys):
    with pytest.raises(SystemExit):
        module.main(["--help"])
    assert "is a program, which runs: pass only one you trust" in re.sub(r"\s+", " ", capsys.readouterr().out)


# Pickled code, wherever a file is read


def test_objects_in_arrays_are_not_unpickled(fails, latent_store, tmp_path, rng):
    target, code = tmp_path / "owned", np.array([None], object)
    code[0] = Malicious(target)
    np.save(tmp_path / "labels.npy", code, allow_pickle=True)
    np.savez(tmp_path / "code.npz", arr_0=np.repeat(code, 4))
    np.savez(tmp_path / "good.npz", arr_0=rng.integers(0, 256, (12, 4, 4, 3), np.uint8))
    np.savez(tmp_path / "owner.npz", mu=np.zeros(48), sigma=np.eye(48), features=code)
    checkpoint = random_checkpoint(tmp_path / "sit.pt", num_classes=3)
    many = ("--num-fid-samples", "1", "--sample-dir", tmp_path / "out", "--vae", "pixels")
    assert "labels.npy" in fails(sample_ddp.main, "--ckpt", checkpoint, "--labels", tmp_path / "labels.npy", *many)
    for name in ("code.npz", "owner.npz"):
        error = fails(evaluator.main, tmp_path / name, tmp_path / "good.npz", "--features", "pixels")
        assert name in error and "pickled Python objects, which are not loaded" in error
    for name in ("labels.npy", "latents.npy"):
        store = tmp_path / name.removesuffix(".npy")
        store.mkdir()
        for path in latent_store.iterdir():
            (store / path.name).write_bytes(path.read_bytes())
        (store / name).write_bytes((tmp_path / "labels.npy").read_bytes())
        assert name in fails(train_mask_adan.main, *train_argv(store, tmp_path / "runs"))
    assert not target.exists()
    with np.load(tmp_path / "code.npz", allow_pickle=True) as file:
        file["arr_0"]
    assert target.exists()  # the attack is a real one


def test_weights_of_extractors_are_not_unpickled(fails, tmp_path, rng):
    target = tmp_path / "owned"
    np.savez(tmp_path / "a.npz", arr_0=rng.integers(0, 256, (12, 4, 4, 3), np.uint8))
    for protocol in ("zip", "bare"):
        path = tmp_path / f"{protocol}.pth"
        content = {"a": Malicious(target)}
        if protocol == "zip":
            torch.save(content, path)
        else:
            path.write_bytes(pickle.dumps(content))
        files = (tmp_path / "a.npz", tmp_path / "a.npz")
        for flags in (
            ("--features", "inception", "--inception-weights", path),
            ("--features", "timm:test_vit.r160_in1k", "--timm-weights", path),
        ):  # fmt: skip
            assert path.name in fails(evaluator.main, *files, *flags)
    assert not target.exists()


# Secrets


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (URL, "https://host.invalid/a.pt"),
        (f"{URL}#sha256=12", "https://host.invalid/a.pt#sha256=12"),
        (f"cannot read {URL}: no (such) file?", "cannot read https://host.invalid/a.pt no (such) file?"),
        ("http://token@host/x", "http://host/x"),
        ("s3://key:secret@bucket/a?b=c d?e", "s3://bucket/a d?e"),
        ("https:/user:secret@host/a?b=c", "https:/host/a"),  # a path was made of it
        ("https://user:se/cr#et@host/a.pt", "https://host/a.pt"),
        ("https://host:8080/a@b.pt", "https://host:8080/a@b.pt"),
        ("https://host/a.pt", "https://host/a.pt"),
        ("https://host/a@b.pt", "https://host/a@b.pt"),
        ("a/b?c@d", "a/b?c@d"),
        ("user@host:path", "user@host:path"),
        ("", ""),
    ],
)
def test_redaction(text, shown):
    assert redact(text) == shown
    assert redact(shown) == shown


def test_redaction_of_flags():
    flags = {"ckpt": URL, "ckpts": ["a", URL], "steps": 3, "amm": None}
    clean = "https://host.invalid/a.pt"
    assert redact_values(flags) == {"ckpt": clean, "ckpts": ["a", clean], "steps": 3, "amm": None}


@pytest.mark.parametrize("name", [URL, "file://user:s3cret-pass@host/a.pt", f"{URL}#sha256=1"])
def test_messages_show_no_password(name):
    """http.client says "nonnumeric port: 's3cret-pass@host'"."""
    for read in (fetch, load_codec):
        with pytest.raises(ValueError) as error:
            read(name)
        assert not any(secret in str(error.value) for secret in SECRETS)


def test_a_run_stores_no_secret(latent_store, tmp_path, monkeypatch, capsys):
    """Neither the W&B key nor an URL's token is in anything that a training run leaves or says."""
    start = tmp_path / "edt.pt"
    results = tmp_path / "runs"
    train_mask_adan.main(train_argv(latent_store, tmp_path / "first", "--max-steps", "1"))
    start.write_bytes(next((tmp_path / "first").rglob("0000001.pt")).read_bytes())
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setenv("WANDB_API_KEY", "")
    monkeypatch.setattr("training.setup.fetch", lambda name: start)
    flags = ("--wandb", "--wandb-key", "s3cret-pass", "--init-from", "https://host.invalid/a.pt?token=t0ken-value")
    train_mask_adan.main(train_argv(latent_store, results, "--max-steps", "1", *flags))
    files = [path for path in results.rglob("*") if path.is_file() and not path.is_symlink()]
    assert len(files) >= 3
    for path in files:
        assert not any(secret.encode() in path.read_bytes() for secret in SECRETS), path
    assert not any(secret in text for text in capsys.readouterr() for secret in SECRETS)
    state = torch.load(next(results.rglob("0000001.pt")), weights_only=True)
    assert state["args"]["init_from"] == "https://host.invalid/a.pt" and "wandb_key" not in state["args"]


# What is fetched stays in its folder


class Hostile(http.server.BaseHTTPRequestHandler):
    """Names a file of its own choice, or sends the reader to a local one."""

    def do_GET(self):
        if self.path.startswith("/away"):
            self.send_response(302)
            self.send_header("Location", "file:///etc/hostname")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("Content-Disposition", 'attachment; filename="../../../evil.pt"')
        self.send_header("Content-Length", "4")
        self.end_headers()
        self.wfile.write(b"evil")

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture
def hostile(tmp_path, monkeypatch):
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "a" / "b" / "hub"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Hostile))
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    "path", ["/x.pt", "/..%2f..%2f..%2fevil.pt", "/%2e%2e/%2e%2e/evil.pt", "/a/..", "/..\\..\\evil.pt", "/.%00.pt"]
)
def test_the_server_does_not_choose_where_a_file_goes(hostile, tmp_path, path):
    got = fetch(f"{hostile}{path}")
    assert got.resolve().parent == (tmp_path / "a" / "b" / "hub" / "checkpoints").resolve()
    assert got.read_bytes() == b"evil"
    outside = [p for p in tmp_path.rglob("*") if p.is_file() and "hub" not in p.parts]
    assert outside == [] and not (tmp_path.parent / "evil.pt").exists()


def test_a_redirect_to_a_local_file_is_not_followed(hostile, tmp_path):
    with pytest.raises(ValueError, match="cannot download"):
        fetch(f"{hostile}/away.pt")
    assert not any((tmp_path / "a" / "b" / "hub" / "checkpoints").iterdir())


@pytest.mark.parametrize(
    "name", ["owner/name/../../x.pt", "owner/name@../x.pt", "owner/name/a/../../../x.pt", "owner/name/./x.pt"]
)
def test_hub_paths_do_not_climb(monkeypatch, name):
    for asked in ("hf_hub_download", "snapshot_download"):
        monkeypatch.setattr(huggingface_hub, asked, lambda *args, **kwargs: pytest.fail(f"asked for {args}"))
    with pytest.raises(ValueError, match=r"has no \. and \.\. in it"):
        fetch(name)


def test_archives_only_hold_arrays(tmp_path):
    """No archive is unpacked: of an .npz a member is read by its name, and nothing else."""
    np.savez(tmp_path / "a.npz", **{"arr_0": np.zeros(3), "../../escaped": np.zeros(3)})
    from data.npz import npz_keys, read_array

    assert npz_keys(tmp_path / "a.npz") == ["arr_0", "../../escaped"]
    assert read_array(tmp_path / "a.npz", "../../escaped").shape == (3,)
    assert [path.name for path in tmp_path.rglob("*")] == ["a.npz"] and not (tmp_path.parent.parent / "escaped.npy").exists()


def test_versions_are_pinned():
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert lines and all(re.fullmatch(r"[\w-]+==[\w.+]+", line) for line in lines)


def test_namespace_is_the_only_class_a_checkpoint_may_name(tmp_path):
    """Published checkpoints hold their flags as one; any other class is refused."""
    from models.checkpoints import read_file

    torch.save({"args": argparse.Namespace(model="EDT-S/2")}, tmp_path / "a.pt")
    assert read_file(tmp_path / "a.pt")["args"].model == "EDT-S/2"
    torch.save({"args": Path("a")}, tmp_path / "b.pt")
    with pytest.raises(ValueError, match="refused"):
        read_file(tmp_path / "b.pt")
    assert fetching.SCHEMES == ("https", "http", "file")
