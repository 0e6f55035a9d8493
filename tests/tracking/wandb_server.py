"""As much of W&B's server as a run needs, on this machine, to be taken down in every way."""

import contextlib
import gzip
import http.server
import json
import threading
import time

BUCKET = {"id": "i", "displayName": "n", "description": None, "config": "{}", "sweepName": None, "historyLineCount": 0}
PROJECT = {"id": "p", "name": "project", "entity": {"id": "e", "name": "entity"}}
FEATURES = {"serverInfo": {"features": [], "cliVersionInfo": {"max_cli_version": "9.9.9"}}}


class Server(http.server.ThreadingHTTPServer):
    """`state` is "up", "500" or "silent", which takes requests and never answers."""

    daemon_threads, block_on_close = True, False

    def __init__(self, state: str):
        super().__init__(("127.0.0.1", 0), Handler)
        self.state, self.history = state, []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def die(self):
        self.shutdown()
        self.server_close()


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        body = gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body
        if self.server.state == "silent":
            time.sleep(60)
        answer = {}
        if self.path == "/graphql":
            query, name = json.loads(body)["query"], (json.loads(body).get("variables") or {}).get("name")
            answer = {"data": FEATURES}
            if "upsertBucket" in query:
                answer = {"data": {"upsertBucket": {"bucket": {**BUCKET, "name": name, "project": PROJECT}, "inserted": True}}}
            elif "createRunFiles" in query:  # an answer without it makes wandb's own process panic
                answer = {"data": {"createRunFiles": {"runID": "i", "uploadHeaders": [], "files": []}}}
            elif "RunResumeStatus" in query:
                answer = {"data": {"model": {**PROJECT, "bucket": None}}}
        elif self.path.endswith("/file_stream"):
            files = json.loads(body).get("files") or {}
            self.server.history += [json.loads(line) for line in files.get("wandb-history.jsonl", {}).get("content", [])]
        content = json.dumps(answer).encode()
        with contextlib.suppress(OSError):
            self.send_response(500 if self.server.state == "500" else 200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    def log_message(self, *_):
        pass
