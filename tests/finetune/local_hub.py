"""A server of the Hugging Face hub's protocol, as far as downloads use it, for one repository."""

import hashlib
import http.server
import json
import threading
import urllib.parse
from pathlib import Path

COMMIT = hashlib.sha1(b"the only commit").hexdigest()


class LocalHub:
    """Serves the files of a folder as `org/tiny`; `requests` has the paths that were asked for."""

    def __init__(self, folder: Path):
        self.requests: list[tuple[str, str]] = []
        hub, files = self, {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                self.answer(body=True)

            def do_HEAD(self):
                self.answer(body=False)

            def answer(self, body):
                path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
                hub.requests.append((self.command, path))
                if path.startswith("/api/models/org/tiny"):
                    return self.api(path.removeprefix("/api/models/org/tiny").strip("/"), body)
                prefix, _, rest = path.removeprefix("/").partition("/resolve/")
                revision, _, name = rest.partition("/")
                if prefix != "org/tiny":
                    return self.fail("RepoNotFound", "Repository not found", body, 401)
                if revision not in ("main", "v1", COMMIT):
                    return self.fail("RevisionNotFound", "Invalid rev id", body)
                if name not in files:
                    return self.fail("EntryNotFound", "Entry not found", body)
                content = files[name]
                headers = {
                    "X-Repo-Commit": COMMIT,
                    "ETag": f'"{hashlib.sha1(content).hexdigest()}"',
                }
                return self.send(content, body, headers)

            def api(self, rest, body):
                kind, _, revision = rest.partition("/")
                if revision not in ("", "main", "v1", COMMIT):
                    return self.fail("RevisionNotFound", "Invalid rev id", body)
                if kind == "tree":
                    found = [
                        {
                            "type": "file",
                            "path": name,
                            "size": len(content),
                            "oid": hashlib.sha1(content).hexdigest(),
                        }
                        for name, content in sorted(files.items())
                    ]
                else:
                    siblings = [{"rfilename": name} for name in sorted(files)]
                    found = {"id": "org/tiny", "sha": COMMIT, "siblings": siblings}
                return self.send(json.dumps(found).encode(), body, {})

            def fail(self, code, message, body, status=404):
                headers = {"X-Error-Code": code, "X-Error-Message": message}
                return self.send(json.dumps({"error": message}).encode(), body, headers, status)

            def send(self, content, body, headers, status=200):
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(content))}.items():
                    self.send_header(name, value)
                self.end_headers()
                if body:
                    self.wfile.write(content)

            def log_message(self, *_):
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self):
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def downloaded(self) -> list[str]:
        """Return the names of the files that were sent."""
        return [
            path.rpartition("/")[2]
            for how, path in self.requests
            if how == "GET" and "resolve" in path
        ]
