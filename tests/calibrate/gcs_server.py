"""A server on loopback with as much of the JSON API of Google Cloud Storage as its clients ask for.

gcsfs finds it by `STORAGE_EMULATOR_HOST`, tensorstore, which Orbax writes arrays with, by
`TENSORSTORE_GCS_HTTP_URL`. Objects are kept in memory.
"""

import base64
import contextlib
import hashlib
import json
import re
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TIME = "2026-01-01T00:00:00.000Z"


class Store:
    """Objects of all buckets: bytes and generation, by bucket and name."""

    def __init__(self):
        self.objects, self.uploads, self.lock, self.count = {}, {}, threading.RLock(), 0

    def names(self, bucket):
        """Names of the objects of a bucket."""
        with self.lock:
            return sorted(name for one, name in self.objects if one == bucket)

    def put(self, bucket, name, data, match):
        """What the object is now; None if its generation is not `match`, 0 for none."""
        with self.lock:
            _, generation = self.objects.get((bucket, name), (b"", 0))
            if match is not None and int(match) != generation:
                return None
            self.count += 1
            self.objects[bucket, name] = (data, self.count)
            return self.described(bucket, name)

    def described(self, bucket, name):
        """The resource of an object."""
        data, generation = self.objects[bucket, name]
        return {
            "kind": "storage#object",
            "bucket": bucket,
            "name": name,
            "size": str(len(data)),
            "generation": str(generation),
            "metageneration": "1",
            "timeCreated": TIME,
            "updated": TIME,
            "md5Hash": base64.b64encode(hashlib.md5(data).digest()).decode(),
        }


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        """Nothing: the test's output is for its claims."""

    def handle(self):
        """Until the client has gone, which it may do in the middle of an answer."""
        with contextlib.suppress(ConnectionError):
            super().handle()

    def answer(self, code, body=b"", **headers):
        """Send a response; what is no bytes as JSON."""
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
        self.send_response(code)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), str(value))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def body(self):
        """What came with the request."""
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def any(self):
        """Every request."""
        url, body = urllib.parse.urlsplit(self.path), self.body()
        query = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
        where = re.fullmatch(r"(.*)/b/([^/]+)(?:/o(?:/(.*))?)?", url.path)
        if url.path.startswith("/batch"):
            self.batch(body)
        elif where is None:
            self.answer(404, {"error": {"code": 404, "message": url.path}})
        elif where[1].startswith("/upload"):
            self.upload(where[2], query, body)
        elif where[3]:
            self.object(where[2], urllib.parse.unquote(where[3]), query)
        elif "/o" in url.path[len(where[1]) + len(where[2]) + 3 :]:
            self.list(where[2], query)
        else:
            self.answer(200, {"kind": "storage#bucket", "name": where[2]})

    do_GET = do_POST = do_PUT = do_DELETE = any

    def object(self, bucket, name, query):
        """Read, describe or delete an object."""
        store = self.server.store
        with store.lock:
            if (bucket, name) not in store.objects:
                self.answer(404, {"error": {"code": 404, "message": f"no {bucket}/{name}"}})
            elif self.command == "DELETE":
                del store.objects[bucket, name]
                self.answer(204)
            elif query.get("alt") == "media":
                self.media(*store.objects[bucket, name])
            else:
                self.answer(200, store.described(bucket, name))

    def media(self, data, generation):
        """The bytes of an object, or the range that was asked for."""
        said = {"X_Goog_Generation": generation, "X_Goog_Stored_Content_Length": len(data)}
        span = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or "")
        if span is None:
            self.answer(200, data, **said)
            return
        first = int(span[1]) if span[1] else max(len(data) - int(span[2]), 0)
        last = int(span[2]) if span[1] and span[2] else len(data) - 1
        part = data[first : last + 1]
        said["Content_Range"] = f"bytes {first}-{first + len(part) - 1}/{len(data)}"
        self.answer(206, part, **said)

    def list(self, bucket, query):
        """The objects of a prefix, and with a delimiter the prefixes behind it."""
        prefix, delimiter, store = (
            query.get("prefix", ""),
            query.get("delimiter"),
            self.server.store,
        )
        first, end = query.get("startOffset", ""), query.get("endOffset") or "\U0010ffff"
        items, prefixes = [], {}
        with store.lock:
            for name in store.names(bucket):
                if not name.startswith(prefix) or not first <= name < end:
                    continue
                head, found, _ = name[len(prefix) :].partition(delimiter or "\0")
                if found:
                    prefixes[prefix + head + delimiter] = True
                else:
                    items.append(store.described(bucket, name))
        self.answer(200, {"kind": "storage#objects", "items": items, "prefixes": [*prefixes]})

    def upload(self, bucket, query, body):
        """The three ways to write an object."""
        store, kind, match = self.server.store, query["uploadType"], query.get("ifGenerationMatch")
        if kind == "resumable" and "upload_id" not in query:
            key = str(len(store.uploads))
            name = query.get("name") or json.loads(body)["name"]
            store.uploads[key] = (name, match, b"")
            place = f"http://{self.headers['Host']}/upload/storage/v1/b/{bucket}/o"
            self.answer(200, {}, Location=f"{place}?uploadType=resumable&upload_id={key}")
            return
        if kind == "resumable":
            name, match, data = store.uploads[query["upload_id"]]
            data += body
            store.uploads[query["upload_id"]] = (name, match, data)
            if self.headers.get("Content-Range", "").endswith("/*"):
                self.answer(308, Range=f"bytes=0-{len(data) - 1}")
                return
        elif kind == "multipart":
            boundary = re.search(r"boundary=['\"]?([^'\";]+)", self.headers["Content-Type"])[1]
            _, about, content = body.split(f"--{boundary}".encode(), 2)
            content = content.rsplit(f"--{boundary}--".encode(), 1)[0]
            name = json.loads(re.split(rb"\r?\n\r?\n", about, maxsplit=1)[1])["name"]
            data = re.split(rb"\r?\n\r?\n", content, maxsplit=1)[1]
            data = data[: -2 if data.endswith(b"\r\n") else -1]
        else:
            name, data = query["name"], body
        said = store.put(bucket, name, data, match)
        if said is None:
            self.answer(412, {"error": {"code": 412, "message": "conditionNotMet"}})
        else:
            self.answer(200, said)

    def batch(self, body):
        """Several deletions in one request."""
        boundary = re.search(r"boundary=['\"]?([^'\";]+)", self.headers["Content-Type"])[1]
        parts = []
        for number, one in enumerate(body.decode().split(f"--{boundary}")[1:-1], 1):
            where = re.search(r"DELETE \S*?/b/([^/]+)/o/([^?\s]+)", one)
            with self.server.store.lock:
                key = where[1], urllib.parse.unquote(where[2])
                gone = self.server.store.objects.pop(key, None)
            asked = re.search(r"Content-ID:\s*<?([^>\r\n]+)", one)
            status = "204 No Content" if gone else "404 Not Found"
            parts.append(
                "--parts\r\nContent-Type: application/http\r\n"
                f"Content-ID: <response-{asked[1] if asked else number}>\r\n\r\n"
                f"HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n\r\n"
            )
        text = "".join(parts) + "--parts--"
        self.answer(200, text.encode(), Content_Type="multipart/mixed; boundary=parts")


@contextlib.contextmanager
def serve():
    """The store of a server, and what its clients must have in their environment."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.store = True, Store()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    found = {
        "STORAGE_EMULATOR_HOST": url,
        "TENSORSTORE_GCS_HTTP_URL": url,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
        # Else gcsfs asks Google which kind of bucket it is.
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        "EPATH_USE_TF": "false",
    }
    try:
        yield server.store, found
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
