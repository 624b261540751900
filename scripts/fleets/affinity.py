"""Conversations: how much of their prompts is found in the cache of whoever answers."""
import contextlib
import itertools
import random

from fleets.parts import MODEL, PORTS, WORDS, Replica, ask, at_once, replicas

CONVERSATIONS, TURNS = 16, 6
SYSTEM = "You help travellers. Answer in one short sentence, and never ask a question back."


def questions(conversation):
    """What a client says in its turns."""
    words = random.Random(conversation)
    begin = " ".join(words.choices(WORDS, k=60))
    yield f"These are the stations of journey {conversation}: {begin}. Which one is the last?"
    for turn in range(1, TURNS):
        yield f"And after stop {turn}, is there a {words.choice(WORDS)} or a {words.choice(WORDS)}? Say why."


def converse(where, session):
    """Sums of prompt tokens, and of those that were cached, over 16 conversations at a time. `where` gives the URL of a turn."""

    def conversation(i):
        messages, sums = [{"role": "system", "content": SYSTEM}], [0, 0]
        for question in questions(i):
            messages.append({"role": "user", "content": question})
            body = {"model": MODEL, "messages": messages, "max_tokens": 24, "temperature": 0}
            reply = ask(where(), body, f"journey-{i}" if session else None)
            if reply.status != 200:
                raise SystemExit(f"fleet: error: {reply.status} in a conversation: {reply.body[:300]}")
            answer = reply.json()
            usage = answer["usage"]
            sums[0] += usage["prompt_tokens"]
            sums[1] += usage["prompt_tokens_details"]["cached_tokens"]
            messages.append({"role": "assistant", "content": answer["choices"][0]["message"]["content"]})
        return sums

    prompt, cached = map(sum, zip(*at_once(CONVERSATIONS, conversation)))
    return cached / prompt


def references(report):
    """The share with one replica alone, and with three in turn."""
    with Replica(PORTS[0]) as replica:
        alone = converse(lambda: replica.url, False)
    with contextlib.ExitStack() as stack:
        urls = itertools.cycle([stack.enter_context(replica).url for replica in replicas()])
        in_turn = converse(lambda: next(urls), False)
    report.line("conversations that go on where they began are cached", alone > in_turn, one_replica=alone, three_in_turn=in_turn)
    return alone, in_turn


def share(report, balancer, known):
    alone, in_turn = known
    found = converse(lambda: balancer.url, balancer.session)
    report.line(f"{balancer.name}: the cached share is at least 0.9 of one replica's, and above that of three in turn",
                found >= 0.9 * alone and found > in_turn, share=found, of_one_replica=found / alone)
