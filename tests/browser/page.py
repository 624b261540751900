"""The page at / in a real browser, against running servers: page.py BASE_URL KEYED_URL. The second one's key is `secret`. tests/page.rs runs it."""
import json
import sys
import unittest
import urllib.request

from chromium import CTRL, SHIFT, Chromium

BASE = sys.argv.pop(1).rstrip("/") + "/"
KEYED = sys.argv.pop(1).rstrip("/") + "/"
PROMPT = "Count from one to thirty in words."
# What the page's own scripts do not tell: when its first text was painted, and what moved.
WATCH = """
window.painted = null; window.shifted = 0;
new PerformanceObserver((list) => { for (const e of list.getEntries()) shifted += e.value; }).observe({type: "layout-shift", buffered: true});
addEventListener("DOMContentLoaded", () => {
  new MutationObserver(() => {
    if (!document.getElementById("answer").textContent.trim()) return;
    requestAnimationFrame(() => setTimeout(() => { painted ??= (performance.timeOrigin + performance.now()) / 1e3; }));
  }).observe(document.getElementById("answer"), {childList: true, subtree: true});
});
"""
CHROMIUM = None


def setUpModule():
    global CHROMIUM
    CHROMIUM = Chromium()


def tearDownModule():
    CHROMIUM.__exit__()


def post(path, body):
    request = urllib.request.Request(BASE + path, json.dumps(body).encode(), {"content-type": "application/json"})
    return json.load(urllib.request.urlopen(request))


def load():
    request = urllib.request.Request(BASE, headers={"accept": "application/json"})
    return json.load(urllib.request.urlopen(request))["load"]


def open_page(**more):
    page = CHROMIUM.open(BASE, before=WATCH, **more)
    page.wait("document.getElementById('fact-context').textContent.includes('tokens')")
    return page


def text_of(page, name):
    return page.eval(f"document.getElementById('{name}').textContent")


def fill(page, name, value):
    page.click(f"#{name}")
    page.eval(f"document.getElementById('{name}').select()")
    page.type(str(value))


def ask(page, prompt=PROMPT, mode="auto", max_tokens=60):
    """Types a prompt and sends it with the keyboard."""
    fill(page, "max-tokens", max_tokens)
    page.click(f"[value={mode}]")
    fill(page, "prompt", prompt)
    page.press("Enter", CTRL)


def answer(page, *args, **more):
    ask(page, *args, **more)
    page.wait("run?.over")


def focused(page):
    return page.eval("document.activeElement.id || document.activeElement.value || document.activeElement.textContent.trim()")


def luminance(colour):
    parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (c / 255 for c in colour)]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


def contrast(one, other):
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def colour(page, selector, name):
    value = page.eval(f"getComputedStyle(document.querySelector('{selector}')).{name}")
    return [float(c) for c in value[value.index("(") + 1:-1].split(",")[:3]]


class Streaming(unittest.TestCase):
    def test_a_typed_prompt_streams_text_at_once_and_asks_nobody_else(self):
        page = open_page()
        answer(page)
        page.idle(0.3)
        # Sampling is greedy: the API gives the same text, whatever was drafted.
        chat = {"messages": [{"role": "user", "content": PROMPT}], "temperature": 0, "seed": 1, "max_tokens": 60}
        whole = post("v1/chat/completions", chat)
        self.assertEqual(text_of(page, "answer"), whole["choices"][0]["message"]["content"])
        self.assertEqual(page.complaints, [])
        others = [r["url"] for r in page.requests.values() if not r["url"].startswith(BASE)]
        self.assertEqual(others, [])
        (sent,) = [r for r in page.requests.values() if r["method"] == "POST"]
        delay = page.eval("painted") - sent["first_data"]
        print(f"text is painted {delay * 1e3:.0f} ms after its first bytes; the first token came {text_of(page, 'first-token')} after sending")
        self.assertLess(delay, 1)
        self.assertEqual(page.eval("shifted"), 0, "the page's parts moved")
        self.assertEqual(text_of(page, "error"), "")

    def test_tokens_tell_who_drafted_them_and_totals_and_table_agree(self):
        page = open_page()
        answer(page, "Repeat this line five times: the sun is warm and the sea is blue", max_tokens=80)
        classes = page.eval("[...document.querySelectorAll('#answer .t')].map((t) => t.classList[1] ?? 'model')")
        drafted = sum(c in ("heads", "text", "both") for c in classes)
        self.assertTrue(set(classes) <= {"model", "heads", "text", "both", "nl"} and drafted > 0, classes)
        self.assertGreater(page.eval("document.querySelectorAll('#answer .s.m').length"), 0, "no step is seen to have given several tokens")
        tokens, steps, accepted = (int(text_of(page, name)) for name in ("n-tokens", "n-steps", "n-accepted"))
        self.assertTrue(tokens > steps > 0 and accepted > 0 and int(text_of(page, "n-drafted")) >= accepted)
        self.assertAlmostEqual(float(text_of(page, "per-step")), tokens / steps, delta=0.01)
        row = page.eval("[...document.querySelector('#runs tr').cells].map((cell) => cell.textContent)")
        self.assertEqual(row[1:5], ["auto", str(tokens), str(steps), text_of(page, "per-step")])
        page.hover("#answer .s.m .t")
        told = page.wait("document.getElementById('inspect').textContent")
        self.assertRegex(told, r'^".*": (drafted|the model).*; step \d+ gave \d+ tokens from \d+ rows?$')

    def test_nothing_is_drafted_with_speculation_off(self):
        page = open_page()
        answer(page, mode="off", max_tokens=16)
        self.assertEqual(page.eval("document.querySelectorAll('#answer .heads, #answer .text, #answer .both').length"), 0)
        self.assertEqual(text_of(page, "per-step"), "1.00")

    def test_plots_are_drawn(self):
        page = open_page()
        # Pixels that are neither empty nor a line of the grid nor its numbers.
        ink = """(id) => {
          const c = document.getElementById(id), d = c.getContext('2d').getImageData(40, 0, c.width - 40, c.height).data;
          const counts = {}; for (let i = 0; i < d.length; i += 4) if (d[i + 3]) { const k = d.slice(i, i + 3).join(); counts[k] = (counts[k] ?? 0) + 1; }
          return Object.keys(counts).length; }"""
        plots = ("plot-tokens", "plot-rows", "plot-rate")
        page.wait(f"({ink})('plot-tokens') > 0")
        before = {plot: page.eval(f"({ink})('{plot}')") for plot in plots}
        answer(page, max_tokens=120)
        for plot in plots:
            page.wait(f"({ink})('{plot}') > {before[plot]}")
        page.wait("document.getElementById('plot-tokens').ariaLabel.includes('in the mean')")

    def test_stop_and_escape_end_the_answer_on_the_server_too(self):
        page = open_page()
        for stop in (lambda: page.press("Escape"), lambda: page.click("#stop")):
            ask(page, "Write all numbers from one to five hundred.", mode="off", max_tokens=460)
            page.wait("document.querySelectorAll('#answer .t').length > 3")
            self.assertFalse(page.eval("document.getElementById('stop').disabled"))
            stop()
            page.wait("run.over")
            self.assertTrue(text_of(page, "status").startswith("Stopped"), text_of(page, "status"))
            self.assertLess(page.eval("run.tokens"), 460)
            page.wait("fetch('./', {headers: {accept: 'application/json'}}).then((r) => r.json()).then(({load}) => load.in_flight === 0)", 20)
        self.assertEqual(load()["kv_cells_running"], 0)
        self.assertEqual(page.complaints, [])

    def test_a_new_prompt_takes_the_place_of_one_that_runs(self):
        page = open_page()
        ask(page, "Write all numbers from one to five hundred.", mode="off", max_tokens=460)
        page.wait("document.querySelectorAll('#answer .t').length > 3")
        answer(page, "Say yes.", max_tokens=8)
        page.idle(0.3)
        self.assertLessEqual(page.eval("document.querySelectorAll('#answer .t').length"), 8)
        self.assertEqual(load()["in_flight"], 0)


class Appearance(unittest.TestCase):
    def test_both_themes_at_both_widths(self):
        for dark in (False, True):
            for width, height in ((1280, 900), (390, 844)):
                with self.subTest(dark=dark, width=width):
                    page = open_page(width=width, height=height, dark=dark)
                    answer(page, max_tokens=40)
                    self.assertLessEqual(page.eval("document.documentElement.scrollWidth"), width)
                    self.assertEqual(luminance(colour(page, "body", "backgroundColor")) < 0.2, dark)
                    self.assertEqual(page.eval("shifted"), 0, "the page's parts moved")

    def test_contrast_is_enough_in_both_themes(self):
        for dark in (False, True):
            page = open_page(dark=dark)
            panel, ground = colour(page, "#answer", "backgroundColor"), colour(page, "body", "backgroundColor")
            for source in ("heads", "text", "both", "grammar"):
                ink, tint, line = (colour(page, f"#ink-{source}", name) for name in ("color", "backgroundColor", "borderBottomColor"))
                self.assertGreaterEqual(contrast(ink, tint), 4.5, source)
                self.assertGreaterEqual(contrast(line, panel), 4.5, source)
            for selector in ("h2", "dt", ".status", "figcaption", "#inspect-hint", "#error", "nav a"):
                for below in (panel, ground):
                    self.assertGreaterEqual(contrast(colour(page, selector, "color"), below), 4.5, selector)
            for selector in ("#prompt", "#max-tokens", ".segments"):
                self.assertGreaterEqual(contrast(colour(page, selector, "borderTopColor"), ground), 3, selector)
            styles = [page.eval(f"getComputedStyle(document.getElementById('ink-{s}')).borderBottomStyle") for s in ("heads", "text", "both", "grammar")]
            self.assertEqual(len(set(styles)), 4, "not by colour alone")

    def test_the_switch_outweighs_the_system_and_is_remembered(self):
        page = open_page()
        page.eval("(() => { const t = document.getElementById('theme'); t.value = 'dark'; t.dispatchEvent(new Event('change')); })()")
        self.assertLess(luminance(colour(page, "body", "backgroundColor")), 0.2)
        page.call("Page.reload")
        page.wait("document.readyState === 'complete' && document.getElementById('theme').value === 'dark'")
        self.assertLess(luminance(colour(page, "body", "backgroundColor")), 0.2)


class Keyboard(unittest.TestCase):
    def test_tab_goes_through_the_page_in_its_order_and_is_seen(self):
        page = open_page()
        answer(page, max_tokens=24)
        page.eval("document.activeElement.blur()")
        page.click(".name p")
        seen = []
        for _ in range(20):
            page.press("Tab")
            seen.append(focused(page))
            outline = page.eval("(() => { const e = document.activeElement; const s = getComputedStyle(e.type === 'radio' ? e.nextElementSibling : e); "
                                "return s.outlineStyle !== 'none' && parseFloat(s.outlineWidth) >= 2; })()")
            self.assertTrue(outline, seen[-1])
            if seen[-1] == "answer":
                break
        order = ["API", "openapi.json", "metrics", "theme", "count", "correct", "tell", "prompt", "functions", "auto", "max-tokens", "temperature", "seed", "share", "send", "answer"]
        self.assertEqual(seen[-len(order):], order)
        page.press("ArrowRight")
        first = text_of(page, "inspect")
        page.press("ArrowRight")
        self.assertTrue(first and text_of(page, "inspect") != first)
        page.press("Tab", SHIFT)
        self.assertEqual(focused(page), "send")
        page.press("Enter")
        page.wait("told.length === 2")

    def test_readers_of_screens_hear_the_ends_and_not_each_token(self):
        page = open_page()
        live = page.eval("[...document.querySelectorAll('[aria-live], [role=status], [role=alert], output')].filter((e) => !e.closest('figure')).map((e) => e.id)")
        self.assertEqual(live, ["status", "error", "inspect"])
        unlabelled = page.eval("[...document.querySelectorAll('input, select, textarea')].filter((e) => !e.labels.length).map((e) => e.id)")
        self.assertEqual(unlabelled, [])


class Trouble(unittest.TestCase):
    def test_an_error_is_shown_as_the_server_words_it(self):
        page = open_page()
        answer(page, max_tokens=99999)
        try:
            post("v1/chat/completions", {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 99999})
        except urllib.error.HTTPError as error:
            self.assertEqual(text_of(page, "error"), json.load(error)["error"]["message"])
        answer(page, max_tokens=4)
        self.assertEqual(text_of(page, "error"), "")

    def test_a_key_is_asked_for_sent_and_stored_nowhere(self):
        page = open_page()
        refusal = json.dumps({"error": {"message": "this needs an API key", "type": "invalid_request_error", "param": None, "code": "invalid_api_key"}})
        page.intercept_with(lambda request: None if request["headers"].get("authorization") == "Bearer secret" else (401, "application/json", refusal))
        self.assertTrue(page.eval("document.getElementById('key-row').hidden"))
        answer(page, max_tokens=4)
        self.assertEqual(text_of(page, "error"), "this needs an API key")
        self.assertEqual(focused(page), "key")
        page.type("secret")
        page.press("Enter")
        page.wait("run.over && run.tokens > 0")
        self.assertEqual(text_of(page, "error"), "")
        self.assertEqual(page.eval("JSON.stringify([localStorage, sessionStorage])"), "[{},{}]")

    def test_a_server_with_a_key_is_used_with_it(self):
        page = CHROMIUM.open(KEYED)
        page.wait("!document.getElementById('key-row').hidden")
        answer(page, max_tokens=4)
        self.assertIn("API key", text_of(page, "error"))
        page.type("secret")
        page.press("Enter")
        page.wait("run.over && run.tokens > 0")
        self.assertEqual(text_of(page, "error"), "")
        page.wait("document.getElementById('fact-context').textContent.includes('tokens')")

    def test_without_a_chat_template_the_prompt_goes_as_it_is(self):
        page = open_page()
        refusal = json.dumps({"error": {"message": "the model has no chat template", "param": "messages"}})
        page.intercept_with(lambda request: (400, "application/json", refusal) if "/v1/chat" in request["url"] else None)
        prompt = "Emoji list: 😀 😃 😄 😁 😆 😅"
        answer(page, prompt, max_tokens=24)
        whole = post("generate", {"prompt": prompt, "max_tokens": 24, "temperature": 0, "seed": 1})
        self.assertEqual(text_of(page, "answer"), whole["generated_text"])
        self.assertNotIn("\ufffd", text_of(page, "answer"))
        self.assertEqual(text_of(page, "n-tokens"), "24")

    def test_an_answer_that_breaks_off_says_so(self):
        page = open_page()
        piece = {"choices": [{"delta": {"content": "Half"}, "finish_reason": None, "tokens": [{"id": 1, "text": "Half", "source": None, "step": 1, "rows": 3}]}]}
        events = f"data: {json.dumps(piece)}\n\n"
        for more, said in (("", "The answer broke off"), ('data: {"error": {"message": "the engine failed"}}\n\n', "the engine failed")):
            page.intercept_with(lambda request, more=more: (200, "text/event-stream", events + more) if "/v1/chat" in request["url"] else None)
            answer(page)
            self.assertIn(said, text_of(page, "error"))
            self.assertEqual(text_of(page, "answer"), "Half")


class Placing(unittest.TestCase):
    """Tokens onto text, where a token's own text may be a part of a character: U+FFFD."""

    def test_every_piece_of_text_is_shown_once_with_the_token_that_completes_it(self):
        page = open_page()
        cases = [
            (" two", [" two"], [" two"]),
            (" one two", [" one", " two"], [" one", " two"]),
            ("one two", [" one", " two"], ["one", " two"]),  # a space that the tokeniser dropped
            (" 😀", [" �", "�"], [" ", "😀"]),
            ("😀", ["�", "�", "�"], ["😀"]),
            ("😀x", ["�", "�", "x"], ["😀", "x"]),
            ("a😀b c", ["a", "�", "�", "b", " c"], ["a", "😀", "b", " c"]),
            ("😀 😁", ["�", "�", " �", "�"], ["😀", " ", "😁"]),
            ("é!ok", ["�", "�!", "ok"], ["é!", "ok"]),
            ("😀😁", ["�", "�", "�", "�"], ["😀😁"]),  # where one ends is not told
            ("\u1ebfx", ["�", "�x"], ["\u1ebfx"]),
            ("held", [], ["held"]),
            ("a", ["a", "�"], ["a"]),  # the rest comes with the next piece
        ]
        for text, tokens, expected in cases:
            told = json.dumps([{"text": t} for t in tokens])
            placed = page.eval(f"(() => {{ const w = []; return [place({json.dumps(text)}, {told}, w).map((m) => [m.text, m.tokens.length]), w.length]; }})()")
            parts = [part for part, _ in placed[0]]
            self.assertEqual("".join(parts), text)
            self.assertEqual(parts, expected, tokens)
            self.assertEqual(sum(n for _, n in placed[0]) + placed[1], len(tokens), "each token is told once")


if __name__ == "__main__":
    unittest.main(verbosity=2)
