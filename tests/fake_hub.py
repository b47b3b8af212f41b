"""A hub in this process that speaks as much of the hub's protocol over HTTP as uploads and downloads of models need.

One user owns it: a request that writes needs the token `TOKEN`; any other token is refused everywhere, as on the hub.
"""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN, READ_TOKEN, USER = "hf_thetokenthatmaywrite", "hf_thetokenthatmayread", "tester"


class FakeHub:
    """`repos[id][branch]` is a list of commits, oldest first, the first one empty, each a dict from path to bytes."""

    def __init__(self):
        self.repos, self.private, self.objects, self.requests = {}, {}, {}, []
        self.refuse_commits = False
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def handle_request(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
                url = urlsplit(self.path)
                hub.requests.append((self.command, url.path))
                status, headers, content = hub.answer(
                    self.command, unquote(url.path), parse_qs(url.query), body, token, self.path
                )
                if not isinstance(content, bytes):
                    content = json.dumps(content).encode()
                self.send_response(status)
                for name, value in {"Content-Length": str(len(content)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_request

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def add(self, repo_id, files, revision="main"):
        """Put files into a repository as its owner would."""
        self.repos.setdefault(repo_id, {"main": [{}]}).setdefault(revision, []).append(files)

    def files(self, repo_id, revision="main"):
        return self.find(repo_id, revision)[1]

    def find(self, repo_id, revision):
        """The name and the files of a commit, by branch or name."""
        for commits in self.repos.get(repo_id, {}).values():
            for files in commits:
                if commit_name(files) == revision:
                    return revision, files
        commits = self.repos.get(repo_id, {}).get(revision)
        if commits is None:
            return None
        return commit_name(commits[-1]), commits[-1]

    def answer(self, method, path, query, body, token, address):
        """Status, headers and content of the answer to a request."""
        if token not in (None, TOKEN, READ_TOKEN):
            return error(401, "Invalid credentials in Authorization header")
        if path == "/api/whoami-v2":
            role = "write" if token == TOKEN else "read"
            return ok({"name": USER, "type": "user", "auth": {"accessToken": {"displayName": "t", "role": role}}})
        if path == "/api/validate-yaml":
            yaml.safe_load(json.loads(body)["content"].split("---\n")[1])
            return ok({"errors": [], "warnings": []})
        if path.startswith("/objects/") and method == "PUT":
            assert hashlib.sha256(body).hexdigest() == path.removeprefix("/objects/")
            self.objects[path.removeprefix("/objects/")] = body
            return ok({})
        if path == "/api/repos/create":
            if token != TOKEN:
                return error(401, "Unauthorized")
            wanted = json.loads(body)
            repo_id = f"{wanted.get('organization') or USER}/{wanted['name']}"
            if repo_id in self.repos:
                return 409, {}, {"url": f"{self.url}/{repo_id}", "error": "You already created this model repo"}
            self.repos[repo_id] = {"main": [{}]}
            self.private[repo_id] = wanted.get("visibility") == "private" or wanted.get("private") is True
            return ok({"url": f"{self.url}/{repo_id}"})
        if found := re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", path):
            objects = json.loads(body)["objects"]
            return ok({"transfer": "basic", "objects": [self.upload_of(wanted) for wanted in objects]})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/([a-z]+)(?:/(.+))?)?", path):
            return self.answer_about(method, *found.groups(), body, token)
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self.resolve(*found.groups())
        return error(404, f"No such thing: {method} {address}")

    def upload_of(self, wanted):
        return {**wanted, "actions": {"upload": {"href": f"{self.url}/objects/{wanted['oid']}", "header": {}}}}

    def answer_about(self, method, repo_id, what, rest, body, token):
        if repo_id not in self.repos:
            return error(404, "Repository not found", "RepoNotFound")
        if what in (None, "revision"):
            found = self.find(repo_id, rest or "main")
            if found is None:
                return error(404, f"Invalid rev id: {rest}", "RevisionNotFound")
            siblings = [{"rfilename": name} for name in found[1]]
            return ok({"id": repo_id, "modelId": repo_id, "sha": found[0], "siblings": siblings, "tags": []})
        if what == "tree":
            files = self.files(repo_id, rest.split("/")[0])
            return ok(
                [{"type": "file", "path": name, "size": len(text), "oid": sha1(text)} for name, text in files.items()]
            )
        if token != TOKEN:
            return error(403, "Forbidden: this token may not write")
        if what == "branch":
            if rest in self.repos[repo_id]:
                return error(409, "Reference already exists")
            self.repos[repo_id][rest] = list(self.repos[repo_id]["main"])
            return ok({})
        if what == "preupload":
            mode = {True: "lfs", False: "regular"}
            files = json.loads(body)["files"]
            return ok(
                {
                    "files": [
                        {
                            "path": file["path"],
                            "uploadMode": mode[not file["path"].endswith((".json", ".md"))],
                            "shouldIgnore": False,
                        }
                        for file in files
                    ]
                }
            )
        if what == "commit" and not self.refuse_commits:
            return self.commit(repo_id, rest, [json.loads(line) for line in body.splitlines()])
        return error(503 if self.refuse_commits else 404, f"{what} of {repo_id} is not to be had")

    def commit(self, repo_id, revision, lines):
        commits = self.repos[repo_id][revision]
        files = dict(commits[-1])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.objects[value["oid"]]
        commits.append(files)
        name = commit_name(files)
        return ok({"commitUrl": f"{self.url}/{repo_id}/commit/{name}", "commitOid": name, "success": True})

    def resolve(self, repo_id, revision, path):
        found = self.find(repo_id, revision)
        if found is None:
            code = "RevisionNotFound" if repo_id in self.repos else "RepoNotFound"
            return error(404, f"{repo_id} has no {revision}", code)
        name, files = found
        if path not in files:
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": name}, {"error": "Entry not found"}
        return 200, {"X-Repo-Commit": name, "ETag": f'"{sha1(files[path])}"'}, files[path]


def ok(content):
    return 200, {"Content-Type": "application/json"}, content


def error(status, message, code=None):
    headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
    return status, headers, {"error": message}


def sha1(content):
    return hashlib.sha1(content).hexdigest()


def commit_name(files):
    """40 hexadecimal digits, as git's."""
    return sha1(repr(sorted((path, sha1(content)) for path, content in files.items())).encode())


@contextmanager
def fake_hub():
    hub = FakeHub()
    thread = threading.Thread(target=hub.server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.server.shutdown()
        hub.server.server_close()
