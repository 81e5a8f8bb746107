"Guards on the Hugging Face Hub, played by a small server on this machine that can lose the connection, refuse a token, or be away."

import base64
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import huggingface_hub.constants
import pytest
import torch

from cpsample.core.classifier import MLPClassifier
from cpsample.core.guard import Guard
from cpsample.core.guard_files import save_guard
from cpsample.core.schedule import make_schedule
from cpsample.production.hub import from_pretrained, push_to_hub


@pytest.fixture
def guard():
    return Guard(
        MLPClassifier((1, 8, 8), K=2, width=64, depth=1),
        make_schedule(),
        alpha=0.03,
        scale=5.0,
        report={"alpha": 0.03},
    )


@pytest.fixture
def hub(monkeypatch, tmp_path):
    "The Hub: `files` of each repo, which repos are `public`, `tokens` that are known, and `cut` is the number of answers that break off half way."
    state = SimpleNamespace(files={}, public=set(), tokens={"good"}, cut=0)

    class Answers(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def reply(self, status, body=b"", **headers):
            body = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            for name, value in {"Content-Length": len(body), **headers}.items():
                self.send_header(name.replace("_", "-"), str(value))
            self.end_headers()
            return body

        def allowed(self, repo):
            known = (self.headers.get("Authorization") or "").removeprefix(
                "Bearer "
            ) in state.tokens
            if repo in state.files and (known or repo in state.public):
                return True
            self.reply(404 if known else 401, **({"X_Error_Code": "RepoNotFound"}))

        def file(self):
            if not (found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", self.path)):
                return self.reply(404) and None
            repo, name = found.groups()
            if not self.allowed(repo):
                return None
            body, start = state.files[repo].get(name), 0
            if body is None:
                return self.reply(404, X_Error_Code="EntryNotFound") and None
            headers = {
                "ETag": f'"{abs(hash(body)):032x}"',
                "X_Repo_Commit": "0" * 40,
                "Accept_Ranges": "bytes",
            }
            if found := re.match(r"bytes=(\d+)-", self.headers.get("Range") or ""):
                start = int(found.group(1))
                headers["Content_Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
            return self.reply(206 if start else 200, body[start:], **headers)

        def do_HEAD(self):
            self.file()

        def do_GET(self):
            if found := re.fullmatch(r"/api/models/([^/]+/[^/?]+).*", self.path):
                if self.allowed(repo := found.group(1)):
                    self.wfile.write(
                        self.reply(
                            200, {"id": repo, "private": repo not in state.public, "siblings": []}
                        )
                    )
            elif body := self.file():
                if state.cut:
                    state.cut -= 1
                    body = body[: len(body) // 2]
                self.wfile.write(body)
                self.wfile.flush()
                self.close_connection = True

        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))

            def say(status, body):
                self.wfile.write(self.reply(status, body))

            if (self.headers.get("Authorization") or "").removeprefix(
                "Bearer "
            ) not in state.tokens:
                return say(401, {"error": "Invalid credentials"})
            if self.path == "/api/repos/create":
                asked = json.loads(body)
                repo = f"{asked.get('organization', 'me')}/{asked['name']}"
                if repo in state.files:
                    return say(409, {"error": "exists", "url": f"{state.address}/{repo}"})
                state.files[repo] = {}
                if not asked.get("private") and asked.get("visibility") != "private":
                    state.public.add(repo)
                return say(200, {"url": f"{state.address}/{repo}"})
            if not (found := re.match(r"/api/models/([^/]+/[^/]+)/", self.path)):
                return say(200, {})  # is the card's header well formed, and the like
            repo = found.group(1)
            if "/preupload/" in self.path:
                return say(
                    200,
                    {
                        "files": [
                            {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                            for f in json.loads(body)["files"]
                        ]
                    },
                )
            for line in body.decode().splitlines():
                if (entry := json.loads(line))["key"] == "file":
                    state.files[repo][entry["value"]["path"]] = base64.b64decode(
                        entry["value"]["content"]
                    )
            say(200, {"commitUrl": f"{state.address}/{repo}/commit/1", "commitOid": "0" * 40})

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    state.address = f"http://127.0.0.1:{server.server_port}"
    settings = {
        "ENDPOINT": state.address,
        "HUGGINGFACE_CO_URL_TEMPLATE": state.address + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_XET": True,
    }
    for name, value in settings.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the client waits between its tries
    state.cache = tmp_path / "cache"
    yield state
    server.shutdown()
    server.server_close()


def same(a, b):
    return (a.alpha, a.scale, a.report) == (b.alpha, b.scale, b.report) and all(
        torch.equal(p, q) for p, q in zip(a.classifier.parameters(), b.classifier.parameters())
    )


def one_line(told):
    assert "\n" not in str(told.value)
    return str(told.value)


def test_there_and_back(hub, guard):
    push_to_hub(guard, "me/secret", token="good")
    assert (
        set(hub.files["me/secret"]) == {"guard.safetensors", "guard.json", "README.md"}
        and b"secret as those images" in hub.files["me/secret"]["README.md"]
    )
    assert "me/secret" not in hub.public and same(from_pretrained("me/secret", token="good"), guard)


def test_a_guard_is_not_put_where_all_can_see_it_unless_asked(hub, guard):
    hub.files["me/open"] = {}
    hub.public.add("me/open")
    with pytest.raises(
        ValueError,
        match="me/open is public, and a guard tells who was in the training set: make it private",
    ):
        push_to_hub(guard, "me/open", token="good")
    assert hub.files["me/open"] == {}
    push_to_hub(guard, "me/open", private=False, token="good")
    assert same(from_pretrained("me/open"), guard)


def test_a_wrong_token(hub, guard):
    with pytest.raises(
        OSError,
        match="^writing 'me/x' on the Hub failed: the token is wrong or missing: hf auth login",
    ) as told:
        push_to_hub(guard, "me/x", token="bad")
    assert one_line(told) and hub.files == {}
    push_to_hub(guard, "me/x", token="good")
    with pytest.raises(OSError, match="^reading 'me/x' on the Hub failed: .*token") as told:
        from_pretrained("me/x", token="bad")
    assert one_line(told)


def test_a_name_that_is_not_there(hub):
    with pytest.raises(
        OSError, match="^reading 'me/none' on the Hub failed: there is no such repository"
    ) as told:
        from_pretrained("me/none", token="good")
    assert one_line(told)
    with pytest.raises(OSError, match="^reading 'no such/name/at all'") as told:
        from_pretrained("no such/name/at all")
    assert one_line(told)


def test_the_connection_breaks_and_the_next_run_goes_on(hub, guard):
    push_to_hub(guard, "me/x", token="good")
    hub.cut = 100
    with pytest.raises(
        OSError, match="^reading 'me/x' on the Hub failed: .*connect to the network and try again"
    ) as told:
        from_pretrained("me/x", token="good")
    assert one_line(told) and not list(hub.cache.rglob("guard.safetensors"))
    hub.cut = 1
    assert same(from_pretrained("me/x", token="good"), guard)


def test_without_a_network_what_was_had_before_is_used(hub, guard, monkeypatch):
    push_to_hub(guard, "me/x", token="good")
    from_pretrained("me/x", token="good")
    monkeypatch.setattr(
        huggingface_hub.constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}",
    )
    assert same(from_pretrained("me/x", token="good"), guard)
    with pytest.raises(
        OSError,
        match="^reading 'me/other' on the Hub failed: .*connect to the network and try again",
    ) as told:
        from_pretrained("me/other", token="good")
    assert one_line(told)


def test_an_error_without_words_is_told_by_its_name(hub, monkeypatch):
    class ReadTimeout(Exception):
        pass

    def slow(*_, **__):
        raise ReadTimeout

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", slow)
    with pytest.raises(
        OSError,
        match="^reading 'me/x' on the Hub failed: ReadTimeout: connect to the network and try again$",
    ):
        from_pretrained("me/x")


def test_a_file_that_is_no_guard(hub):
    hub.files["me/x"] = {"guard.safetensors": b"nonsense" * 10}
    with pytest.raises(ValueError, match="cannot be read as a guard"):
        from_pretrained("me/x", token="good")


def test_a_folder(tmp_path, guard):
    save_guard(guard, tmp_path / "guard")
    assert same(from_pretrained(tmp_path), guard) and same(from_pretrained(str(tmp_path)), guard)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no guard at"):
        from_pretrained(tmp_path / "empty")
