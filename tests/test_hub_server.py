"""The Hub that other tests run against is one for the real client."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hub_client import Client
from tests.hub_server import Hub


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with Hub() as running:
        yield running


@pytest.fixture(scope="module")
def client(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    with Client(hub.url, tmp_path_factory.mktemp("client")) as started:
        yield started


def test_who_am_i(client: Client) -> None:
    assert client.call("hub", method="whoami")["name"] == "ada"
    assert client.call("hub", method="whoami", token="hf_bob")["name"] == "bob"
    assert "HfHubHTTPError" in client.attempt("hub", method="whoami", token="hf_nobody").errors


def test_upload_list_download(hub: Hub, client: Client, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.txt").write_text("a")
    (tmp_path / "weights.safetensors").write_bytes(bytes(range(256)) * 1000)
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# A card\n")
    client.call("hub", method="create_repo", repo_id="ada/files")
    with hub.recording() as requests:
        commit = client.call("hub", method="upload_folder", repo_id="ada/files", folder_path=str(tmp_path))
    assert len([request for request in requests if "/commit/" in request]) == 1
    assert len([request for request in requests if request.startswith("PUT /lfs/")]) == 1
    assert hub.repos["ada/files"].files() == {
        "sub/a.txt": b"a",
        "weights.safetensors": bytes(range(256)) * 1000,
        "README.md": b"---\nlicense: mit\n---\n# A card\n",
    }
    listed = client.call("hub", method="list_repo_files", repo_id="ada/files")
    assert sorted(listed) == [".gitattributes", "README.md", "sub/a.txt", "weights.safetensors"]
    info = client.call("hub", method="model_info", repo_id="ada/files")
    assert info["sha"] == commit["oid"]
    assert info["card_data"]["license"] == "mit"
    folder = Path(client.call("hub", method="snapshot_download", repo_id="ada/files"))
    assert folder.name == commit["oid"]
    assert (folder / "weights.safetensors").read_bytes() == bytes(range(256)) * 1000
    assert (folder / "sub" / "a.txt").read_text() == "a"
    assert not client.call("hub", method="file_exists", repo_id="ada/files", filename="b.txt")


def test_every_commit_stays(hub: Hub, client: Client) -> None:
    client.call("hub", method="create_repo", repo_id="ada/history")
    first = client.call("upload", repo_id="ada/history", files={"a.txt": "1"})["oid"]
    client.call("hub", method="create_branch", repo_id="ada/history", branch="old")
    client.call("upload", repo_id="ada/history", files={"a.txt": "2"})
    assert client.call("read", repo_id="ada/history", filename="a.txt") == "2"
    assert client.call("read", repo_id="ada/history", filename="a.txt", revision=first) == "1"
    assert client.call("read", repo_id="ada/history", filename="a.txt", revision="old") == "1"
    commits = client.call("hub", method="list_repo_commits", repo_id="ada/history")
    assert [commit["title"] for commit in commits] == ["Add files", "Add files", "initial commit"]
    stale = client.attempt("upload", repo_id="ada/history", files={"a.txt": "3"}, parent_commit=first)
    assert "HfHubHTTPError" in stale.errors
    assert hub.repos["ada/history"].files() == {"a.txt": b"2"}


def test_pull_requests(hub: Hub, client: Client) -> None:
    client.call("hub", method="create_repo", repo_id="ada/asked")
    pull = client.call("upload", repo_id="ada/asked", files={"a.txt": "1"}, create_pr=True, token="hf_bob")
    assert pull["pr_revision"] == "refs/pr/1"
    assert hub.repos["ada/asked"].files() == {}
    assert client.call("read", repo_id="ada/asked", filename="a.txt", revision="refs/pr/1") == "1"
    refs = client.call("hub", method="list_repo_refs", repo_id="ada/asked", include_pull_requests=True)
    assert [ref["name"] for ref in refs["branches"]] == ["main"]
    assert [ref["ref"] for ref in refs["pull_requests"]] == ["refs/pr/1"]


def test_rights(hub: Hub, client: Client) -> None:
    client.call("hub", method="create_repo", repo_id="ada/secret", private=True)
    client.call("upload", repo_id="ada/secret", files={"a.txt": "1"})
    assert client.call("read", repo_id="ada/secret", filename="a.txt") == "1"
    for token in ("hf_bob", None):
        assert (
            "RepositoryNotFoundError"
            in client.attempt("hub", method="model_info", repo_id="ada/secret", token=token).errors
        )
    hub.add("ada/open", {"a.txt": b"1"})
    assert client.call("read", repo_id="ada/open", filename="a.txt", token=None) == "1"
    for token, status in (("hf_bob", "403"), (None, "401")):
        refused = client.attempt("upload", repo_id="ada/open", files={"a.txt": "2"}, token=token)
        assert status in refused.message
    assert hub.repos["ada/open"].files() == {"a.txt": b"1"}
    assert "403" in client.attempt("hub", method="create_repo", repo_id="bob/mine").message
    taken = client.attempt("hub", method="create_repo", repo_id="ada/open")
    assert "409" in taken.message
    client.call("hub", method="create_repo", repo_id="ada/open", exist_ok=True)


def test_what_is_not_there(hub: Hub, client: Client) -> None:
    hub.add("ada/little", {"a.txt": b"1"})
    missing = {"repo_id": "ada/little", "filename": "b.txt"}
    assert "RemoteEntryNotFoundError" in client.attempt("read", **missing).errors
    assert (
        "RevisionNotFoundError" in client.attempt("read", repo_id="ada/little", filename="a.txt", revision="v9").errors
    )
    assert "RepositoryNotFoundError" in client.attempt("read", repo_id="ada/none", filename="a.txt").errors
    broken = client.attempt("upload", repo_id="ada/little", files={"README.md": "---\na: [\n---\n"})
    assert "Invalid metadata" in broken.message


def test_faults(hub: Hub, client: Client) -> None:
    name = "ada/faulty"
    hub.add(name, {f"{letter}.txt": letter.encode() * 1000 for letter in "abc"})
    for status in (401, 403, 404, 409, 429, 500):
        with hub.failing(f"POST .*/{name}/commit/", status):
            failed = client.attempt("upload", repo_id=name, files={"d.txt": "1"})
        assert "HfHubHTTPError" in failed.errors
        assert str(status) in failed.message
    with hub.failing(f"POST .*/{name}/commit/", cut=True):
        assert client.attempt("upload", repo_id=name, files={"d.txt": "1"}).errors
    assert "d.txt" not in hub.repos[name].files()
    client.call("upload", repo_id=name, files={"d.txt": "1"})
    with hub.failing(f"GET /{name}/resolve/main/a.txt", cut=True, times=1), hub.recording() as requests:
        assert client.call("read", repo_id=name, filename="a.txt") == "a" * 1000
    assert len([request for request in requests if request.startswith("GET")]) == 2
    with hub.failing(f"GET /{name}/resolve/main/b.txt", announced=1100, times=1):
        assert client.call("read", repo_id=name, filename="b.txt") == "b" * 1000
    with hub.failing(f"GET /{name}/resolve/main/c.txt", announced=900):
        assert "Consistency check failed" in client.attempt("read", repo_id=name, filename="c.txt").message
