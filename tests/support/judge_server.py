"""A server on this machine that speaks OpenAI's protocol, and judges or answers by a rule."""

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

PARTS = re.compile(
    r"<question>\n(.*?)\n</question>.*<first_answer>\n(.*?)\n</first_answer>.*<second_answer>\n(.*?)\n<", re.S
)


class Judge:
    """What a test wants of the server: the rule for a verdict, failures to begin with; and what it was sent."""

    def __init__(self):
        self.rule = lambda question, first, second: "tie"
        self.reply = None  # what is said in place of a verdict: a function of the last message, or of a raw prompt
        self.failures: list[tuple[int, dict]] = []
        self.usage: dict | None = {"prompt_tokens": 100, "completion_tokens": 10}
        self.body = None  # said instead of a completion
        self.seen, self.lock, self.now, self.most = [], threading.Lock(), 0, 0

    def answer(self, handler) -> tuple[int, dict, bytes]:
        request = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self.lock:
            self.seen.append((handler.path, dict(handler.headers), request))
            if self.failures:
                code, headers = self.failures.pop(0)
                return code, headers, b'{"error": {"message": "no\\nkey secret-key"}}'
        if self.body is not None:
            return 200, {}, self.body
        asked = request["prompt"] if "prompt" in request else request["messages"][-1]["content"]
        found = PARTS.search(asked)
        text = f"Both tried.\nVerdict: {self.rule(*found.groups()) if found else 'tie'}"
        text = self.reply(asked) if self.reply else text
        text, ending = text if isinstance(text, tuple) else (text, "stop")
        values = {
            "choices": [{"message": {"role": "assistant", "content": text}, "text": text, "finish_reason": ending}]
        }
        return 200, {}, json.dumps(values | ({"usage": self.usage} if self.usage else {})).encode()


@contextmanager
def serve_judge() -> Iterator[Judge]:
    """A judge that answers at its `url`, until the block ends."""
    state = Judge()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            code, headers, body = state.answer(self)
            self.send_response(code)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True).start()
    state.url = f"http://127.0.0.1:{http.server_port}/v1"
    yield state
    http.shutdown()
    http.server_close()
