"""A Hub on this machine for tests: the calls that `huggingface_hub` and transformers make to push and to load.

Repositories live in memory. What a repository is called decides how it fails: "forbidden" may not be written, "moved"
gets a foreign commit while one is prepared, "cut" loses the connection at the commit, "stuck" never answers an upload.
"""

import base64
import contextlib
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

OWNER = "tester"
LICENSES = {"apache-2.0", "mit", "cc-by-4.0", "cc-by-sa-4.0", "other", "unknown"}
LARGE = (".safetensors", ".bin", ".gz", ".png")


class Repository:
    """Files of each commit; the last commit is the main branch."""

    def __init__(self):
        self.commits = []
        self.commit({".gitattributes": b"*.safetensors filter=lfs\n"})

    def commit(self, files):
        name = hashlib.sha1(repr((len(self.commits), sorted(files))).encode()).hexdigest()
        self.commits.append((name, dict(files)))

    @property
    def sha(self):
        return self.commits[-1][0]

    @property
    def files(self):
        return dict(self.commits[-1][1])


class Hub(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories, self.uploads, self.tokens, self.requests = {}, {}, set(), []
        self.upload_began = threading.Event()
        self.closing = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request, client_address):
        """A client that went away is part of the tests."""


@contextlib.contextmanager
def running_hub():
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.closing.set()
        hub.shutdown()
        hub.server_close()
        thread.join()


def client_environment(hub, home, token="hf_" + "s3cr3t" * 5):
    """What a process needs in order to talk to this Hub only; `token` must not show up in anything it prints."""
    return {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1"}  # fmt: skip


def card_faults(content):
    """What the Hub checks in the metadata of a card, a Space's too, as far as these cards have it."""
    found = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
    if not found:
        return ["no metadata between two lines of ---"]
    data = yaml.safe_load(found[1])
    faults = []
    if data.get("license", "unknown") not in LICENSES:
        faults.append(f"license {data.get('license')!r} is not on the list")
    if not all(isinstance(tag, str) for tag in data.get("tags", [])):
        faults.append("tags must be strings")
    if "sdk" in data:
        colours = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}
        wrong = {data.get("colorFrom"), data.get("colorTo")} - colours
        faults += [f"colour {one!r} is not on the list" for one in wrong]
        faults += [
            f"{name} must be a text" for name in ("sdk_version", "app_file") if not isinstance(data.get(name), str)
        ]
        if len(data.get("short_description", "")) > 60:
            faults.append("short_description is longer than 60 characters")
    for entry in data.get("model-index", []):
        if not isinstance(entry.get("name"), str) or not entry["name"]:
            faults.append("model-index entries need a name")
        for result in entry.get("results", []):
            for part, keys in (("task", {"type"}), ("dataset", {"name", "type"})):
                if not keys <= set(result.get(part, {})):
                    faults.append(f"a result's {part} needs {sorted(keys)}")
            if not re.fullmatch(r"(?:[\w-]+/)?[\w.-]+", result.get("dataset", {}).get("type", ""), re.ASCII):
                faults.append(f"dataset.type {result['dataset'].get('type')!r} has letters that the Hub refuses")
            if not all({"type", "value"} <= set(metric) for metric in result.get("metrics", [])):
                faults.append("a metric needs type and value")
    return faults


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *words):
        """Quiet."""

    def answer(self, status, content=None, headers=(), raw=None):
        body = raw if raw is not None else json.dumps(content).encode()
        self.send_response(status)
        given = dict(headers)
        for name, value in {"Content-Type": "application/json", "Content-Length": len(body), **given}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status, code, message):
        self.answer(status, {"error": message}, {"X-Error-Code": code, "X-Error-Message": message})

    def read_body(self):
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def handle_request(self):
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append((self.command, path))
        self.server.tokens.add(self.headers.get("Authorization"))
        if self.command == "PUT" and any(name.endswith("/stuck") for name in self.server.repositories):
            self.server.upload_began.set()
            self.server.closing.wait()
            return
        body = self.read_body()
        for pattern, method in ROUTES:
            if found := re.fullmatch(pattern, path):
                getattr(self, method)(body, *found.groups())
                return
        self.refuse(404, "NotFound", f"{self.command} {path} is not served here")

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def validate_card(self, body):
        faults = card_faults(json.loads(body)["content"])
        self.answer(400 if faults else 200, {"errors": [{"message": fault} for fault in faults], "warnings": []})

    def create(self, body):
        asked = json.loads(body)
        name = f"{asked.get('organization') or OWNER}/{asked['name']}"
        if asked.get("type") == "space":
            if asked.get("sdk") not in ("gradio", "docker", "static"):
                return self.refuse(400, "BadRequest", "a Space needs an sdk")
            name = f"spaces/{name}"
        if name.endswith("/forbidden"):
            return self.refuse(403, "Forbidden", "You don't have the rights to create a model here")
        if name in self.server.repositories:
            return self.answer(409, {"error": "it exists", "url": f"{self.server.url}/{name}"})
        self.server.repositories[name] = Repository()
        return self.answer(200, {"url": f"{self.server.url}/{name}", "name": name, "id": name})

    def repository(self, name):
        if name not in self.server.repositories:
            self.refuse(404, "RepoNotFound", f"{name} does not exist")
        return self.server.repositories.get(name)

    def information(self, body, name, revision=None):
        if repository := self.repository(name):
            self.answer(200, {"id": name, "modelId": name, "sha": repository.sha, "private": False, "tags": [],
                              "downloads": 0, "likes": 0,
                              "siblings": [{"rfilename": file} for file in repository.files]})  # fmt: skip

    def preupload(self, body, name):
        files = [{"path": file["path"], "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                  "shouldIgnore": False, "oid": None} for file in json.loads(body)["files"]]  # fmt: skip
        self.answer(200, {"files": files})

    def lfs_batch(self, body, name):
        objects = [
            {**item, "actions": {"upload": {"href": f"{self.server.url}/upload/{item['oid']}"}}}
            for item in json.loads(body)["objects"]
        ]
        self.answer(200, {"transfer": "basic", "objects": objects})

    def upload(self, body, oid):
        assert hashlib.sha256(body).hexdigest() == oid
        self.server.uploads[oid] = body
        self.answer(200, {})

    def commit(self, body, name):
        repository = self.repository(name)
        lines = [json.loads(line) for line in body.splitlines()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        if name.endswith("/cut") and len(repository.commits) > 1:
            self.close_connection = True
            return None
        if name.endswith("/moved") and len(repository.commits) > 1:
            repository.commit({**repository.files, "foreign.txt": b"somebody else's"})
        if header.get("parentCommit") not in (None, repository.sha):
            return self.refuse(412, "PreconditionFailed", "A commit has happened since. Please refresh and try again.")
        files = repository.files
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.uploads[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        repository.commit(files)
        url = f"{self.server.url}/{name}/commit/{repository.sha}"
        return self.answer(
            200, {"success": True, "commitUrl": url, "commitOid": repository.sha, "pullRequestUrl": None}
        )

    def tree(self, body, name):
        if repository := self.repository(name):
            self.answer(200, [as_listed(path, data) for path, data in repository.files.items()])

    def paths(self, body, name):
        asked = {values[0] for key, values in parse_qs(body.decode()).items() if key == "paths"}
        if body.startswith(b"{"):
            asked = set(json.loads(body)["paths"])
        if repository := self.repository(name):
            self.answer(200, [as_listed(path, data) for path, data in repository.files.items() if path in asked])

    def resolve(self, body, name, revision, path):
        repository = self.repository(name)
        if repository is None:
            return None
        commit = {"X-Repo-Commit": repository.sha}
        content = repository.files.get(path)
        if content is None:
            headers = {**commit, "X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            return self.answer(404, {"error": "Entry not found"}, headers)
        headers = {
            **commit,
            "ETag": f'"{hashlib.sha1(content).hexdigest()}"',
            "Content-Type": "application/octet-stream",
        }
        return self.answer(200, headers=headers, raw=content)


def as_listed(path, data):
    """One file as the Hub's listings describe it."""
    return {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}


# A Space's name has its kind in front, as it is another repository than the model of that name.
NAME = r"((?:spaces/)?[\w.-]+/[\w.-]+)"
OF_ANY_KIND = "/api/(?:models/|datasets/|(?=spaces/))"
ROUTES = (
    ("/api/validate-yaml", "validate_card"),
    ("/api/repos/create", "create"),
    (rf"{OF_ANY_KIND}{NAME}(?:/revision/(.+))?", "information"),
    (rf"{OF_ANY_KIND}{NAME}/preupload/.+", "preupload"),
    (rf"/{NAME}\.git/info/lfs/objects/batch", "lfs_batch"),
    (r"/upload/(\w+)", "upload"),
    (rf"{OF_ANY_KIND}{NAME}/commit/.+", "commit"),
    (rf"{OF_ANY_KIND}{NAME}/tree/.+", "tree"),
    (rf"{OF_ANY_KIND}{NAME}/paths-info/.+", "paths"),
    (rf"/(?:datasets/)?{NAME}/resolve/([^/]+)/(.+)", "resolve"),
)
