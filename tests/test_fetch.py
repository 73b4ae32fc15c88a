"""Checkpoints by URL and hub id: downloaded once, checked against their checksum, and one clear line when that fails."""

import concurrent.futures
import errno
import functools
import hashlib
import http.server
import shutil
import socket
import threading
import time
from pathlib import Path

import huggingface_hub
import pytest
import torch

import inference
from models import create_model
from models.checkpoints import describe
from runtime import fetch as module
from runtime.fetch import digest, fetch
from tests.shared import perturb

CONTENT = b"weights" * 1000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Handler(http.server.SimpleHTTPRequestHandler):
    """Counts the files it hands out; /short/... breaks off in the middle, /stall/... sends nothing more."""

    def do_GET(self):
        self.server.served.append(self.path)
        if not self.path.startswith(("/short/", "/stall/")):
            return super().do_GET()
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        self.wfile.write(CONTENT[:100])
        if self.path.startswith("/stall/"):
            self.server.released.wait(20)

    def do_HEAD(self):
        self.send_response(200)
        self.send_header("Content-Length", str(self.server.announced))
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty cache; nothing is remembered of earlier tests. A cluster's proxy is not asked for this machine's files."""
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    module._digest.cache_clear()
    module._advise.cache_clear()
    return tmp_path / "hub"


@pytest.fixture
def server(tmp_path, hub):
    (tmp_path / "files").mkdir()
    for folder in ("a", "b"):
        (tmp_path / "files" / folder).mkdir()
        (tmp_path / "files" / folder / "DiT-XL.pt").write_bytes(CONTENT)
    handler = functools.partial(Handler, directory=str(tmp_path / "files"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.announced, server.released = len(CONTENT), threading.Event()
    server.served, server.url = [], f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.released.set()
    server.shutdown()
    server.server_close()
    thread.join()


def kept(hub):
    return sorted(path.name for path in (hub / "checkpoints").iterdir())


# URLs


def test_a_url_is_downloaded_once(server, hub):
    name = f"{server.url}/a/DiT-XL.pt#sha256={SHA256}"
    path = fetch(name)
    assert path.read_bytes() == CONTENT
    assert path.parent == hub / "checkpoints" and path.name.endswith("-DiT-XL.pt")
    assert fetch(name.replace(SHA256, SHA256.upper())) == path
    assert server.served == ["/a/DiT-XL.pt"]
    other = fetch(f"{server.url}/b/DiT-XL.pt?download=1#sha256={SHA256}")  # of the same name, from another place
    assert other != path and other.suffix == ".pt"
    assert kept(hub) == sorted([path.name, other.name])


def test_a_file_url(tmp_path, hub):
    """Of gigabytes, a copy was made."""
    path = tmp_path / "größe 1.safetensors"
    path.write_bytes(CONTENT)
    assert "%20" in path.as_uri()
    assert fetch(path.as_uri()) == fetch(f"{path.as_uri()}#sha256={SHA256}") == path
    assert fetch(tmp_path.as_uri()) == tmp_path
    assert not hub.exists()
    for name, message in [
        (f"{path.as_uri()}#sha256={'0' * 64}", f"has the sha256 {SHA256}, not 0{{64}}: correct the checksum or the URL"),
        (f"file:///absent.pt#sha256={SHA256}", "/absent.pt is no file"),
        ("file://folder/a.pt", "names the host folder: a local file is file:///FOLDER/FILE"),
    ]:
        with pytest.raises(ValueError, match=message):
            fetch(name)


def test_a_url_without_checksum_says_which_to_pin(server, capsys):
    url = f"{server.url}/a/DiT-XL.pt"
    assert fetch(url) == fetch(url)
    lines = [line for line in capsys.readouterr().err.splitlines() if "sha256" in line]
    assert lines == [f"note: {url} is not checked; pin it as {url}#sha256={SHA256}"]
    assert fetch(f"{url}#sha256={SHA256}").read_bytes() == CONTENT


def test_the_advice_is_computed_once(server, capsys, monkeypatch):
    """Every process hashed gigabytes to say nothing."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(module, "file_sha256", None)
    fetch(f"{server.url}/a/DiT-XL.pt")
    assert "sha256" not in capsys.readouterr().err


def test_a_file_that_has_changed_is_hashed_again(tmp_path):
    path = tmp_path / "a.pt"
    path.write_bytes(CONTENT)
    assert digest(path) == SHA256
    path.write_bytes(b"other")
    assert digest(path) == hashlib.sha256(b"other").hexdigest()


def test_messages_hold_no_secrets(server, capsys):
    """Tokens are in the query."""
    host = server.url.removeprefix("http://")
    fetch(f"{server.url}/a/DiT-XL.pt?token=SECRET")
    messages = [capsys.readouterr().err]
    for name in (f"{server.url}/a/absent.pt?token=SECRET", f"http://me:SECRET@{host}/a.pt", f"{server.url}/?SECRET#x"):
        with pytest.raises(ValueError) as caught:
            fetch(name)
        messages.append(str(caught.value))
    with pytest.raises(ValueError) as caught:
        fetch(f"{server.url}/a/DiT-XL.pt?token=SECRET#sha256={'0' * 64}")
    for message in [*messages, str(caught.value)]:
        assert host in message and "SECRET" not in message


def test_a_wrong_checksum(server, hub):
    url, wrong = f"{server.url}/a/DiT-XL.pt", "0" * 64
    with pytest.raises(ValueError, match=r"cannot download .*invalid hash value.*correct the digits after #sha256="):
        fetch(f"{url}#sha256={wrong}")
    assert kept(hub) == []
    path = fetch(f"{url}#sha256={SHA256}")
    with pytest.raises(ValueError, match=rf"has the sha256 {SHA256}, not {wrong}: remove that file"):
        fetch(f"{url}#sha256={wrong}")
    path.write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"DiT-XL\.pt, the copy of .*, has the sha256"):
        fetch(f"{url}#sha256={SHA256}")


@pytest.mark.parametrize("fragment", ["sha256=12", "md5=" + "0" * 32, "sha256=" + "x" * 64, ""])
def test_a_fragment_that_is_no_checksum(hub, fragment):
    with pytest.raises(ValueError, match="write the checksum as #sha256="):
        fetch(f"https://127.0.0.1:1/a.pt#{fragment}")


def test_a_broken_connection_leaves_nothing(server, hub):
    """torch hub kept the beginning of the file as the whole of it."""
    with pytest.raises(ValueError, match="it ended after 100 of 7000 bytes"):
        fetch(f"{server.url}/short/a.pt")
    with pytest.raises(ValueError, match="cannot download"):
        fetch(f"{server.url}/short/a.pt#sha256={SHA256}")
    assert kept(hub) == []


@pytest.mark.parametrize("announced", [0, 100, ""])
def test_a_server_that_announces_too_little(server, announced):
    """Some answer HEAD with the size of its empty body."""
    server.announced = announced
    assert fetch(f"{server.url}/a/DiT-XL.pt").read_bytes() == CONTENT


def test_a_server_that_falls_silent(server, hub, monkeypatch):
    """It was waited for without end."""
    monkeypatch.setattr(module, "STALL_SECONDS", 0.3)
    with pytest.raises(ValueError, match=r"cannot download .*\(the server sent nothing for 0\.3 seconds\)"):
        fetch(f"{server.url}/stall/a.pt")
    assert kept(hub) == []
    assert socket.getdefaulttimeout() is None


def test_a_cache_that_cannot_be_written(server, hub):
    hub.write_bytes(b"")
    with pytest.raises(ValueError, match=r"cannot download .*: set TORCH_HOME to a writable folder"):
        fetch(f"{server.url}/a/DiT-XL.pt")


def test_absent_and_unreachable(server, hub):
    with pytest.raises(ValueError, match=r"cannot download .*absent\.pt \(HTTP Error 404.*correct the URL, or fetch it on"):
        fetch(f"{server.url}/a/absent.pt")
    with pytest.raises(ValueError, match=r"cannot download http://127\.0\.0\.1:1/a\.pt .*refused"):
        fetch("http://127.0.0.1:1/a.pt")
    assert kept(hub) == []


def test_many_at_once_download_once(server, hub, monkeypatch):
    download = torch.hub.download_url_to_file

    def slow(*args, **kwargs):
        time.sleep(0.2)
        download(*args, **kwargs)

    monkeypatch.setattr(torch.hub, "download_url_to_file", slow)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(fetch, [f"{server.url}/a/DiT-XL.pt#sha256={SHA256}"] * 4))
    assert len(paths) == 1
    assert server.served == ["/a/DiT-XL.pt"]


# The hub


@pytest.fixture
def asked(tmp_path, hub, monkeypatch):
    """What the hub was asked for; it has the file DiT.pt and a pipeline."""
    calls, snapshot = [], tmp_path / "snapshot"
    for part in ("transformer", "vae"):
        (snapshot / part).mkdir(parents=True)
        (snapshot / part / f"{WEIGHTS}.safetensors").write_bytes(b"")
    (snapshot / "DiT.pt").write_bytes(CONTENT)

    def file(repo, filename, revision):
        calls.append((repo, filename, revision))
        return str(snapshot / "DiT.pt")

    def repository(repo, revision, allow_patterns):
        calls.append((repo, tuple(allow_patterns), revision))
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", file)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", repository)
    return calls


WEIGHTS = "diffusion_pytorch_model"
PIPELINE = ("model_index.json", "transformer/config.json", f"transformer/{WEIGHTS}.safetensors")
PIPELINE += ("vae/config.json", f"vae/{WEIGHTS}.safetensors")


@pytest.mark.parametrize(
    "name, call",
    [
        ("owner/DiT-XL-2-256", ("owner/DiT-XL-2-256", PIPELINE, None)),
        ("owner/name@v1.0", ("owner/name", PIPELINE, "v1.0")),
        ("owner/name/DiT.pt", ("owner/name", "DiT.pt", None)),
        (f"owner/name@0123abc/sub/DiT.pt#sha256={SHA256}", ("owner/name", "sub/DiT.pt", "0123abc")),
        ("owner/name@refs/pr/12", ("owner/name", PIPELINE, "refs/pr/12")),
        ("owner/name@refs/pr/1/sub/DiT.pt", ("owner/name", "sub/DiT.pt", "refs/pr/1")),
    ],
)
def test_hub_ids(asked, tmp_path, name, call):
    assert fetch(name) == (tmp_path / "snapshot" / "DiT.pt" if ".pt" in name else tmp_path / "snapshot")
    assert asked == [call]


def test_pickles_are_fetched_where_there_is_nothing_else(asked, tmp_path):
    """Of every precision and format a copy was fetched, each of gigabytes."""
    (tmp_path / "snapshot" / "vae" / f"{WEIGHTS}.safetensors").unlink()
    fetch("owner/name@main")
    assert asked == [("owner/name", PIPELINE, "main"), ("owner/name", (f"vae/{WEIGHTS}.bin",), "main")]


def test_hub_file_of_another_checksum(asked):
    with pytest.raises(ValueError, match=rf"the copy of owner/name/DiT\.pt, has the sha256 {SHA256}, not 000"):
        fetch("owner/name/DiT.pt#sha256=" + "0" * 64)
    with pytest.raises(ValueError, match="a repository has no checksum; pin it as owner/name@REVISION"):
        fetch(f"owner/name#sha256={SHA256}")


def test_a_repository_without_a_transformer(asked, tmp_path):
    shutil.rmtree(tmp_path / "snapshot" / "transformer")
    with pytest.raises(
        ValueError, match=r"no diffusers pipeline with a transformer: name a file in it, as owner/name/FILE\.pt"
    ):
        fetch("owner/name")


@pytest.mark.parametrize("name", ["owner/name", "owner/name/a.pt"])
def test_the_hub_cannot_be_reached(monkeypatch, name):
    def fail(*_, **__):
        raise huggingface_hub.errors.LocalEntryNotFoundError("offline\nand much advice")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(
        ValueError, match=rf"^{name} is no file or folder here, and could not be fetched .*\(offline\): correct"
    ):
        fetch(name)


def test_the_hubs_cache_cannot_be_written(monkeypatch):
    def fail(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ValueError, match=r"No space left on device\): set HF_HOME to a writable folder with room"):
        fetch("owner/name")


@pytest.mark.parametrize(
    "name", ["a.pt", "results/0400000.pt", "./owner/name", "/absent/a.pt", "here/000-DiT/absent.pt", "x y/z"]
)
def test_paths_are_nothing_to_ask_the_hub_for(asked, tmp_path, monkeypatch, name):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    assert fetch(name) == Path(name)
    assert asked == []


def test_an_existing_path_wins(asked, tmp_path, monkeypatch):
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert fetch("owner/name") == Path("owner/name")
    assert fetch(tmp_path / "owner") == tmp_path / "owner"
    assert asked == []


# The command line


def test_sampling_from_a_url(server, tmp_path, fails):
    torch.manual_seed(0)
    model = perturb(create_model("EDT-Ti/2"), 0.02)
    config = describe("EDT-Ti/2", model.config, codec={"name": "pixels", "scale": 1.0}, class_names=())
    torch.save({"ema": model.state_dict(), "config": config}, tmp_path / "files" / "ours.pt")
    digest = hashlib.sha256((tmp_path / "files" / "ours.pt").read_bytes()).hexdigest()
    argv = ["--classes", "1", "--per-class", "1", "--num-sampling-steps", "2", "--out", str(tmp_path / "grid.png")]
    inference.main(["--ckpt", f"{server.url}/ours.pt#sha256={digest}", *argv])
    assert (tmp_path / "grid.png").is_file()
    message = fails(inference.main, "--ckpt", f"{server.url}/absent.pt", *argv)
    assert "cannot download" in message and "404" in message
