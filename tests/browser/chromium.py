"""A headless Chromium over its DevTools protocol, through a pipe: nothing but Python's own library."""
import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time

# https://chromedevtools.github.io/devtools-protocol/: modifiers of Input.dispatchKeyEvent.
CTRL, SHIFT = 2, 8
KEYS = {  # by name: code, number, text
    "Enter": ("Enter", 13, "\r"),
    "Escape": ("Escape", 27, ""),
    "Tab": ("Tab", 9, ""),
    "ArrowLeft": ("ArrowLeft", 37, ""),
    "ArrowRight": ("ArrowRight", 39, ""),
    " ": ("Space", 32, " "),
}
# How long anything may take on a machine that does other things, too.
PATIENCE = 60


def find():
    """The browser that $CHROMIUM names, or one of those in PATH."""
    for name in (os.environ.get("CHROMIUM"), "chromium", "chromium-browser", "google-chrome"):
        if name and (path := shutil.which(name)):
            return path
    raise SystemExit("a browser is missing: run `scripts/setup browser`, or name a Chromium in CHROMIUM")


class Chromium:
    """The process. Ends with the `with` block."""

    def __init__(self):
        self.profile = tempfile.TemporaryDirectory(prefix="page-test-")
        to_browser, self.send_end = os.pipe()
        self.receive_end, from_browser = os.pipe()
        command = [
            find(), "--headless", "--remote-debugging-pipe", f"--user-data-dir={self.profile.name}",
            "--no-first-run", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking",
            "--disable-component-update", "--hide-scrollbars", "--force-color-profile=srgb",
        ]
        if os.geteuid() == 0:
            command.append("--no-sandbox")  # which it refuses to have as root
        # The protocol's pipe is descriptors 3 and 4. A shell puts them there, as they may be the wrong way round here.
        shell = ["sh", "-c", 'exec "$@" 3<&0 4>&1 </dev/null >/dev/null 2>&1', "sh", *command]
        self.process = subprocess.Popen(shell, stdin=to_browser, stdout=from_browser)
        os.close(to_browser)
        os.close(from_browser)
        self.buffer = b""
        self.n_calls = 0
        self.pages = {}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        try:
            self.call("Browser.close")
            self.process.wait(10)
        except Exception:
            self.process.kill()
            self.process.wait()
        os.close(self.send_end)
        os.close(self.receive_end)
        self.profile.cleanup()

    def call(self, method, session=None, **params):
        """Sends a command and returns its result; events that arrive before it are noted."""
        self.n_calls += 1
        message = {"id": self.n_calls, "method": method, "params": params, **({"sessionId": session} if session else {})}
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self.send_end, data):]
        deadline = time.monotonic() + PATIENCE
        number = self.n_calls
        while True:
            answer = self.receive(deadline)
            if answer is None:
                raise TimeoutError(f"{method} had no answer in {PATIENCE} s")
            if answer.get("id") == number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]

    def receive(self, deadline):
        """The next message, which its page has seen; None if there is none in time."""
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.receive_end], [], [], max(0, deadline - time.monotonic()))
            if not ready:
                return None
            data = os.read(self.receive_end, 1 << 20)
            if not data:
                raise RuntimeError("the browser has ended")
            self.buffer += data
        message, _, self.buffer = self.buffer.partition(b"\0")
        message = json.loads(message)
        page = self.pages.get(message.get("sessionId"))
        if page and "method" in message:
            page.note(message["method"], message["params"])
        return message

    def open(self, url, width=1280, height=900, dark=False, before=""):
        """A page in a context of its own, at `url`; `before` is run before its own scripts."""
        context = self.call("Target.createBrowserContext")["browserContextId"]
        target = self.call("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session)
        self.pages[session] = page
        for domain in ("Page", "Runtime", "Network", "Log"):
            page.call(f"{domain}.enable")
        page.resize(width, height)
        page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])
        if before:
            page.call("Page.addScriptToEvaluateOnNewDocument", source=before)
        page.call("Page.navigate", url=url)
        page.wait("document.readyState === 'complete' && location.href !== 'about:blank'")
        return page


class Page:
    """One tab, and what was seen of it."""

    def __init__(self, browser, session):
        self.browser, self.session = browser, session
        self.complaints = []  # of its console
        self.requests = {}  # by id: url, wall time of sending, offset of the clock, time of the first data
        self.intercept = None  # answers a request in place of the server: (request) -> (status, type, body), or None

    def call(self, method, **params):
        return self.browser.call(method, self.session, **params)

    def note(self, event, params):
        if event == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.complaints.append(details.get("exception", {}).get("description", details["text"]))
        elif event == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning"):
            self.complaints.append(str(params["args"]))
        elif event == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.complaints.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")
        elif event == "Network.requestWillBeSent":
            self.requests[params["requestId"]] = {
                "url": params["request"]["url"], "method": params["request"]["method"], "headers": params["request"]["headers"],
                "body": params["request"].get("postData"), "offset": params["wallTime"] - params["timestamp"], "first_data": None,
            }
        elif event == "Network.dataReceived" and (request := self.requests.get(params["requestId"])):
            request["first_data"] = request["first_data"] or params["timestamp"] + request["offset"]
        elif event == "Fetch.requestPaused":
            self.answer(params)

    def answer(self, paused):
        """Passes a paused request on, or answers it. Without waiting: this is called from a wait."""
        made = self.intercept(paused["request"])
        method, params = "Fetch.continueRequest", {"requestId": paused["requestId"]}
        if made:
            status, kind, body = made
            method = "Fetch.fulfillRequest"
            headers = [{"name": "content-type", "value": kind}]
            params |= {"responseCode": status, "responseHeaders": headers, "body": base64.b64encode(body.encode()).decode()}
        self.browser.n_calls += 1
        message = {"id": self.browser.n_calls, "sessionId": self.session, "method": method, "params": params}
        os.write(self.browser.send_end, json.dumps(message).encode() + b"\0")

    def intercept_with(self, answer):
        self.intercept = answer
        self.call("Fetch.enable", patterns=[{"urlPattern": "*"}])

    def resize(self, width, height):
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def eval(self, expression):
        """The value of a JavaScript expression, awaited if it is a promise."""
        done = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in done:
            raise RuntimeError(done["exceptionDetails"].get("exception", {}).get("description", expression))
        return done["result"].get("value")

    def wait(self, expression, seconds=PATIENCE):
        """Waits until an expression is true and returns its value."""
        deadline = time.monotonic() + seconds
        while not (value := self.eval(expression)):
            if time.monotonic() > deadline:
                raise AssertionError(f"waited {seconds} s in vain for {expression}; the page says:\n{self.eval('document.body.innerText')}")
            time.sleep(0.02)
        return value

    def idle(self, seconds):
        """Lets time pass while events are noted."""
        deadline = time.monotonic() + seconds
        while self.browser.receive(deadline) is not None:
            pass

    def type(self, text):
        self.call("Input.insertText", text=text)

    def press(self, key, modifiers=0):
        code, number, text = KEYS[key]
        common = {"key": key, "code": code, "windowsVirtualKeyCode": number, "modifiers": modifiers}
        down = {"type": "keyDown", "text": text} if text and not modifiers & CTRL else {"type": "rawKeyDown"}
        self.call("Input.dispatchKeyEvent", **common, **down)
        self.call("Input.dispatchKeyEvent", **common, type="keyUp")

    def centre(self, selector):
        """Of an element's first line."""
        box = self.eval(f"(() => {{ const e = document.querySelector({json.dumps(selector)}); e.scrollIntoView({{block: 'nearest'}}); "
                        "const r = e.getClientRects()[0]; return [r.x + r.width / 2, r.y + r.height / 2]; })()")
        return {"x": box[0], "y": box[1]}

    def hover(self, selector):
        self.call("Input.dispatchMouseEvent", type="mouseMoved", **self.centre(selector))

    def click(self, selector):
        at = self.centre(selector)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **at)

    def screenshot(self):
        """The whole page as PNG."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        return base64.b64decode(self.call("Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True)["data"])
