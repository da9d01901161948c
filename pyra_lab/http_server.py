"""The service: an exported model behind HTTP, with numpy, Pillow, onnxruntime and the standard library. It lies beside serving.py, which it imports.

    python http_server.py model.int8.onnx --port 8000 --host 127.0.0.1
    curl --data-binary @photo.jpg http://127.0.0.1:8000/

A POST of an image's bytes answers {"classes": [...], "probabilities": [...]}, the most probable first; GET, and HEAD without a body,
says what the classes are and how to ask; whatever can't be answered has a status of 400 or more, and {"error": the reason}. All answers are JSON.
"""

import argparse
import io
import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import serving

MOST_BYTES, MOST_PIXELS = 20_000_000, 50_000_000  # of an image: a few bytes may stand for gigabytes of pixels
ASK = "curl --data-binary @photo.jpg"


def make_handler(model):
    """The class of a request's handler, which answers with a serving.Predictor."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # which tells curl at once to send a large photo: with 1.0 it waits for a second
        timeout = 30  # seconds without a byte, so that a client that hangs holds no thread

        def reply(self, status, content):
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            if status >= 400:  # what was sent may not have been read: it must not be taken for the next request
                self.send_header("Connection", "close")
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def send_error(self, code, message=None, explain=None):  # for what the standard library refuses by itself, as HTML
            self.reply(code, {"error": message or self.responses[code][0]})

        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            self.reply(200, {"usage": f"{ASK} http://{self.headers.get('Host', 'this.address')}/", "classes": model.classes})

        def do_POST(self):
            length = self.headers.get("Content-Length", "")
            if self.headers.get_content_maintype() == "multipart":
                return self.reply(415, {"error": f"send the image's bytes alone, not a form: {ASK}, without -F"})
            if not length.isdecimal() or int(length) == 0:
                return self.reply(411, {"error": f"send an image's bytes and their Content-Length: {ASK}"})
            if int(length) > MOST_BYTES:
                return self.reply(413, {"error": f"send an image of at most {MOST_BYTES // 10**6} MB"})
            row, = serving.predict(model, io.BytesIO(self.rfile.read(int(length))), progress=False)
            self.reply(400 if row.error else 200, {"error": row.error} if row.error else {"classes": row.classes, "probabilities": row.probabilities})

    return Handler


def main(argv=None):
    parser = argparse.ArgumentParser(description="Answers images sent by HTTP with classes and probabilities, from an exported model", allow_abbrev=False)
    parser.add_argument("model", help="model.onnx, or model.int8.onnx, which is faster")
    parser.add_argument("--port", type=int, default=8000, help="0: any that is free (default: %(default)s)")
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen at; 0.0.0.0: all, for other machines too (default: %(default)s)")
    args = parser.parse_args(argv)
    serving.Image.MAX_IMAGE_PIXELS = MOST_PIXELS // 2  # Pillow refuses twice as many, before it decodes them
    model = serving.load(args.model)
    try:
        server = ThreadingHTTPServer((args.host, args.port), make_handler(model))
    except (OSError, OverflowError) as error:
        raise ValueError(f"{args.host}, port {args.port}, can't be listened at: {serving.first_line(error)}; choose others with --host and --port") from error
    print(f"{ASK} http://{args.host}:{server.server_port}/", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"http_server: {error}")
    except KeyboardInterrupt:
        sys.exit()
