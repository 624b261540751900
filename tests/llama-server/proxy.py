"""A reverse proxy in front of our server that speaks llama-server's dialect."""
import asyncio
import json
import os

import dialect

# Headers of one connection, or of a body that is written anew.
HOP = {"host", "connection", "keep-alive", "content-length", "transfer-encoding", "accept-encoding", "expect"}
LIMIT = 1 << 24
JSON = {"content-type": "application/json"}


class Proxy:
    def __init__(self, port, defaults):
        self.port, self.defaults = port, defaults

    async def handle(self, reader, writer):
        """One request. A client that goes away ends our server's request, too."""
        answering = asyncio.ensure_future(self.answer(reader, writer))
        try:
            await answering
        except ConnectionRefusedError:
            os._exit(1) # our server is gone: no case must wait for it
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    async def answer(self, reader, writer):
        head = await read_head(reader)
        method, path, _ = head.pop("").split(" ", 2)
        body = await reader.readexactly(int(head.get("content-length", 0)))
        client = Client(writer)
        work = asyncio.ensure_future(self.route(client, method, path, head, body))
        leaving = asyncio.ensure_future(reader.read(1))
        await asyncio.wait({work, leaving}, return_when=asyncio.FIRST_COMPLETED)
        leaving.cancel()
        if not work.done():
            work.cancel()
        await work

    async def route(self, client, method, path, head, body):
        data = parsed(body) if method == "POST" else None
        if isinstance(data, dict):
            if path in dialect.COMPLETION:
                return await self.complete(client, head, data)
            if path == dialect.COUNT:
                return await self.count(client, head, data)
        if method == "GET" and path == "/slots":
            return await self.read(client, "/", head, lambda text: (json.dumps(dialect.slots(json.loads(text))), {}))
        if method == "GET" and path == "/metrics":
            return await self.read(client, path, head, dialect.metrics)
        path = "/v1/completions" if path in dialect.COMPLETION else dialect.PATHS.get(path, path)
        if isinstance(data, dict):
            data = self.translated(path, data)
            if path == "/v1/embeddings":
                data = await dialect.embedding(data, lambda text: self.tokens(head, text))
        about = {}
        if path == dialect.CHAT and isinstance(data, dict) and data.get("verbose", self.defaults.get("verbose")):
            about = {"__verbose": await self.post("/apply-template", head, dialect.template_body(data))}
        async with self.upstream(method, path, head, body if data is None else json.dumps(data).encode()) as answer:
            await client.send(answer, dialect.chat_event, about)

    def translated(self, path, data):
        if path in dialect.OPENAI:
            data = dialect.chat(data, self.defaults)
        return dialect.conversation(data, self.defaults) if path in (dialect.CHAT, "/apply-template") else data

    async def count(self, client, head, data):
        """Tokens of a chat: those of its prompt."""
        template = await self.post("/apply-template", head, dialect.template_body(self.translated(dialect.CHAT, data)))
        n_tokens = len(await self.tokens(head, template["prompt"], add_special=True))
        client.write(200, JSON, json.dumps({"input_tokens": n_tokens}).encode())

    async def tokens(self, head, text, **options):
        return (await self.post("/tokenize", head, {"content": text, **options}))["tokens"]

    async def post(self, path, head, data):
        """The body of an answer that our server gives to a request of the proxy's."""
        async with self.upstream("POST", path, head, json.dumps(data).encode()) as answer:
            return json.loads(await answer.text())

    async def complete(self, client, head, data):
        """llama-server's own completions; several prompts are several of our requests."""
        data = await dialect.with_tokens(data, lambda text: self.tokens(head, text))
        completion = dialect.Completion(data, self.defaults)

        async def one(index, body):
            async with self.upstream("POST", "/generate", head, json.dumps(body).encode()) as answer:
                if answer.status != 200 or body.get("stream"):
                    await client.send(answer, completion.event)
                    return None
                return completion.answer(json.loads(await answer.text()), index)

        if completion.is_list:
            answers = await asyncio.gather(*(one(i, body) for i, body in enumerate(completion.bodies)))
        else:
            answers = await one(0, completion.bodies[0])
        if not client.has_answer:
            client.write(200, JSON, json.dumps(answers).encode())

    async def read(self, client, path, head, translate):
        async with self.upstream("GET", path, head, b"") as answer:
            if answer.status != 200:
                return await client.send(answer, None)
            text, headers = translate(await answer.text())
            client.write(200, {**answer.headers, **headers}, text.encode())

    def upstream(self, method, path, head, body):
        return Upstream(self.port, method, path, head, body)


class Upstream:
    """A request to our server, in HTTP/1.0: the answer ends where the connection does."""

    def __init__(self, port, method, path, head, body):
        self.port = port
        headers = {name: value for name, value in head.items() if name not in HOP}
        headers |= {"host": f"127.0.0.1:{port}", "content-length": str(len(body))}
        lines = [f"{method} {path} HTTP/1.0", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
        self.request = "\r\n".join(lines).encode("latin-1") + body

    async def __aenter__(self):
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port, limit=LIMIT)
        self.writer.write(self.request)
        head = await read_head(self.reader)
        self.status = int(head.pop("").split(" ")[1])
        self.headers = {name: value for name, value in head.items() if name not in HOP}
        return self

    async def __aexit__(self, *_):
        self.writer.close()

    async def text(self):
        return (await self.reader.read()).decode()


class Client:
    def __init__(self, writer):
        self.writer, self.has_answer = writer, False

    async def send(self, answer, translate, about=None):
        """An answer of our server's: a stream line by line, an error in llama-server's words; `about` is added."""
        if answer.headers.get("content-type") == "text/event-stream":
            self.write(answer.status, answer.headers, b"")
            async for line in answer.reader:
                self.writer.write(dialect.events(translate, line))
                await self.writer.drain()
            return
        body = (await answer.text()).encode()
        status = answer.status
        data = parsed(body) if status >= 400 or about else None
        if isinstance(data, dict) and isinstance(data.get("error"), dict):
            status, data = dialect.error(status, data)
        if data is not None:
            body = json.dumps({**data, **(about or {})}).encode()
        self.write(status, answer.headers, body)

    def write(self, status, headers, body):
        if self.has_answer:
            return
        self.has_answer = True
        lines = [f"HTTP/1.1 {status} -", *(f"{name.title()}: {value}" for name, value in headers.items()), "Connection: close", "", ""]
        self.writer.write("\r\n".join(lines).encode("latin-1") + body)


def parsed(body):
    try:
        return json.loads(body)
    except ValueError:
        return None


async def read_head(reader):
    """The first line under the empty name, and the headers by their names in small letters."""
    first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").rstrip("\r\n").split("\r\n")
    return {"": first, **{name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}}


async def serve(host, port, target, defaults):
    server = await asyncio.start_server(Proxy(target, defaults).handle, host, port, limit=LIMIT)
    async with server:
        await server.serve_forever()
