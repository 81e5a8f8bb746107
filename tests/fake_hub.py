"""The Hugging Face Hub as a small server on this machine, as far as guards need it.

It can lose the connection (`cut`), refuse a token (`tokens`) and show a repository to all
(`public`).
"""

import base64
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0" * 40


class FakeHub:
    """The Hub, in a thread of this process.

    files: name of a repository → {name of a file: its bytes}.
    public: names of the repositories that everybody sees.
    tokens: those that are known.
    cut: number of the next answers that break off half way.
    address: of the server, http://…
    """

    def __init__(self):
        self.files = {}
        self.public = set()
        self.tokens = {"good"}
        self.cut = 0
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()

    def settings(self, cache):
        "What `huggingface_hub.constants` must hold so that the client asks here, and keeps there."
        return {
            "ENDPOINT": self.address,
            "HUGGINGFACE_CO_URL_TEMPLATE": self.address
            + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(cache),
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_OFFLINE": False,
        }


class _Handler(BaseHTTPRequestHandler):
    "One request; `hub` is the `FakeHub` that it belongs to."

    hub: FakeHub

    def log_message(self, *_):
        pass

    @property
    def has_known_token(self):
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        return token in self.hub.tokens

    def send_head(self, status, body=b"", **headers):
        "Status and headers of an answer; the body is sent by `answer`, or not at all."
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    def answer(self, status, record):
        body = json.dumps(record).encode()
        self.send_head(status, body)
        self.wfile.write(body)

    def may_see(self, repo):
        "Whether the repository is there for this token; if not, that has been answered."
        is_there = repo in self.hub.files
        if is_there and (self.has_known_token or repo in self.hub.public):
            return True
        self.send_head(404 if self.has_known_token else 401, X_Error_Code="RepoNotFound")
        return False

    def send_file_head(self):
        "Headers of the file that is asked for; returns its bytes, or None if there is none."
        match = re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", self.path)
        if not match:
            self.send_head(404)
            return None
        repo, name = match.groups()
        if not self.may_see(repo):
            return None
        content = self.hub.files[repo].get(name)
        if content is None:
            self.send_head(404, X_Error_Code="EntryNotFound")
            return None

        # A client whose connection was lost asks for the rest.
        headers = {
            "ETag": f'"{abs(hash(content)):032x}"',
            "X_Repo_Commit": COMMIT,
            "Accept_Ranges": "bytes",
        }
        rest = re.match(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if not rest:
            self.send_head(200, content, **headers)
            return content
        start = int(rest.group(1))
        headers["Content_Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self.send_head(206, content[start:], **headers)
        return content[start:]

    def do_HEAD(self):
        self.send_file_head()

    def do_GET(self):
        about = re.fullmatch(r"/api/models/([^/]+/[^/?]+).*", self.path)
        if about:
            repo = about.group(1)
            if self.may_see(repo):
                private = repo not in self.hub.public
                self.answer(200, {"id": repo, "private": private, "siblings": []})
            return

        content = self.send_file_head()
        if content:
            if self.hub.cut:
                self.hub.cut -= 1
                content = content[: len(content) // 2]
            self.wfile.write(content)
            self.wfile.flush()
            self.close_connection = True

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        upload = re.match(r"/api/models/([^/]+/[^/]+)/", self.path)
        if not self.has_known_token:
            self.answer(401, {"error": "Invalid credentials"})
        elif self.path == "/api/repos/create":
            self.create_repo(json.loads(body))
        elif not upload:
            self.answer(200, {})  # is the card's header well formed, and the like
        elif "/preupload/" in self.path:
            modes = {"uploadMode": "regular", "shouldIgnore": False}
            files = [{"path": file["path"], **modes} for file in json.loads(body)["files"]]
            self.answer(200, {"files": files})
        else:
            self.commit(upload.group(1), body)

    def create_repo(self, wanted):
        repo = f"{wanted.get('organization', 'me')}/{wanted['name']}"
        address = f"{self.hub.address}/{repo}"
        if repo in self.hub.files:
            self.answer(409, {"error": "exists", "url": address})
            return
        self.hub.files[repo] = {}
        if not wanted.get("private") and wanted.get("visibility") != "private":
            self.hub.public.add(repo)
        self.answer(200, {"url": address})

    def commit(self, repo, body):
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                file = entry["value"]
                self.hub.files[repo][file["path"]] = base64.b64decode(file["content"])
        address = f"{self.hub.address}/{repo}/commit/1"
        self.answer(200, {"commitUrl": address, "commitOid": COMMIT})
