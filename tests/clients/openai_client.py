"""OpenAI's own client against a running server: openai_client.py BASE_URL. tests/openai.rs runs it."""
import json
import math
import sys
import time
import unittest
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Literal, Optional

import openai
from langchain_core.messages import AIMessageChunk, HumanMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel, Field

BASE = sys.argv.pop(1)
CLIENT = openai.OpenAI(base_url=f"{BASE}/v1", api_key="none", max_retries=0, timeout=120)
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Name three colours."}]


def chat(**more):
    return CLIENT.chat.completions.create(**{"model": "any", "messages": MESSAGES, "max_tokens": 16, "seed": 3, **more})


def complete(**more):
    return CLIENT.completions.create(**{"model": "any", "prompt": "One, two, three,", "max_tokens": 12, "temperature": 0, **more})


def in_flight():
    request = urllib.request.Request(BASE, headers={"accept": "application/json"})
    return json.load(urllib.request.urlopen(request))["load"]["in_flight"]


class Models(unittest.TestCase):
    def test_the_served_model_is_listed_and_named_in_answers(self):
        (model,) = CLIENT.models.list().data
        self.assertEqual(complete().model, model.id)


class Completions(unittest.TestCase):
    def test_an_answer_has_text_reason_and_counts(self):
        answer = complete()
        (choice,) = answer.choices
        self.assertTrue(choice.text and choice.finish_reason == "length" and answer.object == "text_completion")
        self.assertEqual(answer.usage.completion_tokens, 12)
        self.assertEqual(answer.usage.total_tokens, answer.usage.prompt_tokens + 12)

    def test_sixteen_tokens_are_the_default(self):
        answer = complete(max_tokens=openai.NOT_GIVEN)
        self.assertEqual(answer.usage.completion_tokens, 16)

    def test_a_stop_string_ends_the_text(self):
        free = complete().choices[0].text
        stop = free[4:7]
        choice = complete(stop=[stop]).choices[0]
        self.assertEqual((choice.text, choice.finish_reason), (free[: free.index(stop)], "stop"))

    def test_several_prompts_and_choices_come_in_order(self):
        answer = complete(prompt=["1, 2,", "a, b,"], n=2)
        self.assertEqual([c.index for c in answer.choices], [0, 1, 2, 3])
        texts = [c.text for c in answer.choices]
        self.assertTrue(texts[0] == texts[1] and texts[2] == texts[3], "greedy")
        alone = complete(prompt="1, 2,").usage.prompt_tokens
        self.assertEqual(answer.usage.prompt_tokens, alone + complete(prompt="a, b,").usage.prompt_tokens)

    def test_a_stream_is_the_same_text(self):
        pieces = [chunk.choices[0] for chunk in complete(stream=True)]
        self.assertEqual("".join(p.text for p in pieces), complete().choices[0].text)
        self.assertEqual([p.finish_reason for p in pieces if p.finish_reason], ["length"])

    def test_logprobs_come_with_each_token(self):
        answer = complete(logprobs=2)
        told = answer.choices[0].logprobs
        self.assertEqual("".join(told.tokens), answer.choices[0].text)
        self.assertEqual(told.text_offset, [len("".join(told.tokens[:i])) for i in range(12)])
        for token, logprob, top in zip(told.tokens, told.token_logprobs, told.top_logprobs):
            self.assertTrue(top[token] == logprob == max(top.values()) and len(top) == 2, "greedy takes the likeliest")
        streamed = [chunk.choices[0].logprobs for chunk in complete(logprobs=2, stream=True)]
        self.assertEqual([t for s in streamed if s for t in s.token_logprobs], told.token_logprobs)
        self.assertEqual([t for s in streamed if s for t in s.text_offset], told.text_offset)

    def test_bias_and_extensions_are_heard(self):
        plain = complete(extra_body={"speculation": "off"}).choices[0]
        self.assertEqual(plain.model_extra["speculation"]["drafted"], 0)
        self.assertEqual(plain.text, complete().choices[0].text)
        self.assertEqual(complete(logit_bias={"28": 100}, max_tokens=2).choices[0].text, ",,")


class Chat(unittest.TestCase):
    def test_an_answer_is_the_assistants_message(self):
        answer = chat()
        (choice,) = answer.choices
        self.assertTrue(choice.message.content and choice.message.role == "assistant" and answer.id.startswith("chatcmpl-"))
        self.assertTrue(answer.usage.completion_tokens <= 16 and choice.finish_reason in ("stop", "length"))

    def test_a_stream_has_role_pieces_reason_and_counts(self):
        chunks = list(chat(stream=True, stream_options={"include_usage": True}))
        last = chunks.pop()
        self.assertEqual((last.choices, last.usage.completion_tokens <= 16), ([], True))
        deltas = [c.choices[0].delta for c in chunks]
        self.assertEqual((deltas[0].role, deltas[0].content), ("assistant", ""))
        self.assertEqual("".join(d.content or "" for d in deltas), chat().choices[0].message.content)
        self.assertEqual([bool(c.choices[0].finish_reason) for c in chunks], [False] * (len(chunks) - 1) + [True])
        self.assertTrue(all(c.usage is None and c.id == last.id and c.object == "chat.completion.chunk" for c in chunks))

    def test_choices_differ_and_a_seed_brings_them_again(self):
        first, again = ([c.message.content for c in chat(n=3, temperature=1.5).choices] for _ in range(2))
        self.assertEqual(first, again)
        self.assertEqual(len(set(first)), 3)

    def test_content_may_come_in_parts_which_are_lines(self):
        parts = [{"type": "text", "text": "Name three"}, {"type": "text", "text": "colours."}]
        answer = lambda content: chat(messages=[MESSAGES[0], {"role": "user", "content": content}]).choices[0].message.content
        self.assertEqual(answer(parts), answer("Name three\ncolours."))

    def test_logprobs_have_tokens_bytes_and_others(self):
        answer = chat(logprobs=True, top_logprobs=3, temperature=0)
        told = answer.choices[0].logprobs.content
        self.assertTrue(all(t.top_logprobs[0].logprob == t.logprob and len(t.top_logprobs) == 3 for t in told))
        self.assertEqual(b"".join(bytes(t.bytes) for t in told).decode(), answer.choices[0].message.content)
        self.assertTrue(sum(math.exp(t.logprob) for t in told[0].top_logprobs) <= 1)
        chunks = chat(logprobs=True, temperature=0, stream=True)
        streamed = [t for c in chunks if c.choices[0].logprobs for t in c.choices[0].logprobs.content]
        self.assertEqual([(t.token, t.logprob) for t in streamed], [(t.token, t.logprob) for t in told])
        self.assertTrue(all(t.top_logprobs == [] for t in streamed))

    def test_a_deadline_ends_an_answer(self):
        choice = chat(max_tokens=450, extra_body={"ignore_eos": True, "timeout_s": 0.2}).choices[0]
        self.assertEqual((choice.finish_reason, choice.model_extra["stop_reason"]), ("length", "deadline"))
        with self.assertRaises(openai.APIStatusError) as caught:
            chat(extra_body={"timeout_s": 0})
        self.assertEqual((caught.exception.status_code, caught.exception.code), (408, "deadline"))

    def test_a_reader_that_leaves_ends_its_request(self):
        stream = chat(stream=True, max_tokens=400, extra_body={"ignore_eos": True})
        next(iter(stream))
        stream.close()
        deadline = time.monotonic() + 30
        while in_flight() > 0:
            self.assertLess(time.monotonic(), deadline, "the request still runs")
            time.sleep(0.02)

    def test_langchain_gets_an_answer(self):
        model = ChatOpenAI(model="any", base_url=f"{BASE}/v1", api_key="none", max_tokens=8, max_retries=0)
        self.assertTrue(model.invoke("Say hello.").content)

    def test_langchain_calls_a_bound_tool_and_sends_its_result(self):
        @tool
        def get_weather(city: Annotated[str, Field(max_length=12)]) -> str:
            """The weather in a city."""
            return f"Sunny in {city}, 21 degrees."

        for api in ("chat", "responses"):
            model = ChatOpenAI(model="any", base_url=f"{BASE}/v1", api_key="none", temperature=0, max_tokens=60, max_retries=0,
                               use_responses_api=api == "responses")
            bound = model.bind_tools([get_weather], tool_choice="any", parallel_tool_calls=False)
            history = [HumanMessage("How is the weather in Paris?")]
            called = bound.invoke(history)
            (call,) = called.tool_calls
            self.assertTrue(call["name"] == "get_weather" and 0 < len(call["args"]["city"]) <= 12 and not called.invalid_tool_calls)
            streamed = sum(bound.stream(history), AIMessageChunk(""))
            self.assertEqual([c["args"] for c in streamed.tool_calls], [call["args"]])
            self.assertTrue(model.invoke([*history, called, get_weather.invoke(call)]).text)


class Person(BaseModel):
    name: str = Field(max_length=12)
    age: int = Field(ge=0, le=120)


class Weather(BaseModel):
    sky: Literal["clear", "cloudy", "rain"]
    degrees: Optional[int] = Field(ge=-40, le=50)
    windy: bool


class Family(BaseModel):
    people: list[Person] = Field(min_length=1, max_length=2)
    pets: list[Literal["cat", "dog"]] = Field(max_length=2)


class Structured(unittest.TestCase):
    def test_two_hundred_of_two_hundred_samples_follow_their_schema(self):
        asked = [(Person, "Invent a person."), (Weather, "How is the weather?"), (Family, "Invent a family.")]

        def sample(i):
            form, prompt = asked[i % len(asked)]
            answer = CLIENT.chat.completions.parse(
                model="any", messages=[{"role": "user", "content": prompt + " Answer in JSON."}], response_format=form,
                temperature=1, seed=i, max_tokens=200,
            )  # the client itself validates the text, and raises
            choice = answer.choices[0]
            self.assertTrue(isinstance(choice.message.parsed, form) and choice.finish_reason == "stop", choice)
            return choice.model_extra["speculation"]["drafted"]

        with ThreadPoolExecutor(8) as pool:
            drafted = list(pool.map(sample, range(200)))
        self.assertEqual(len(drafted), 200)
        print(f"200 of 200; {sum(drafted)} candidates were verified on the way", file=sys.stderr)

    def test_json_may_be_asked_for_without_a_schema(self):
        text = chat(response_format={"type": "json_object"}, max_tokens=120, temperature=0).choices[0].message.content
        self.assertTrue(text.startswith("{"), text)

    def test_a_grammar_is_an_extension(self):
        answer = complete(extra_body={"grammar": 'start: " four" | " five"'}).choices[0]
        self.assertTrue(answer.text in (" four", " five") and answer.finish_reason == "stop")

    def test_a_schema_that_nothing_follows_is_refused(self):
        schema = {"type": "json_schema", "json_schema": {"name": "none", "schema": {"enum": []}}}
        with self.assertRaises(openai.BadRequestError) as caught:
            chat(response_format=schema)
        self.assertEqual(caught.exception.param, "response_format")


WEATHER = {
    "type": "function", "name": "get_weather", "description": "The weather in a city.", "strict": True,
    "parameters": {"type": "object", "properties": {"city": {"type": "string", "maxLength": 12}}, "required": ["city"]},
}


def respond(**more):
    asked = {"model": "any", "input": "Name three colours.", "instructions": "Be brief.", "max_output_tokens": 16, "temperature": 0}
    return CLIENT.responses.create(**{**asked, **more})


def checked(answer):
    """The client takes anything: this does not."""
    type(answer).model_validate(answer.model_dump(by_alias=True))
    return answer


class Responses(unittest.TestCase):
    def test_an_answer_has_text_and_counts(self):
        answer = checked(respond())
        self.assertTrue(answer.output_text and answer.id.startswith("resp_") and answer.status in ("completed", "incomplete"))
        self.assertEqual(answer.usage.total_tokens, answer.usage.input_tokens + answer.usage.output_tokens)

    def test_a_stream_is_the_same_answer(self):
        events = [checked(event) for event in respond(stream=True)]
        self.assertEqual([event.sequence_number for event in events], list(range(len(events))))
        text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
        self.assertEqual((text, events[-1].response.output_text), (respond().output_text, text))
        with CLIENT.responses.stream(model="any", input="Name three colours.", temperature=0, max_output_tokens=300) as stream:
            text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
            self.assertEqual(stream.get_final_response().output_text, text)

    def test_a_function_is_called_and_its_result_read(self):
        asked = {"tools": [WEATHER], "tool_choice": "required", "max_output_tokens": 100, "parallel_tool_calls": False}
        history = [{"role": "user", "content": "How is the weather in Paris?"}]
        answer = checked(respond(input=history, **asked))
        (call,) = [item for item in answer.output if item.type == "function_call"]
        self.assertTrue(call.name == "get_weather" and isinstance(json.loads(call.arguments)["city"], str))
        events = [checked(event) for event in respond(input=history, stream=True, **asked)]
        (done,) = [event for event in events if event.type == "response.function_call_arguments.done"]
        self.assertEqual(done.arguments, call.arguments)
        history += answer.output
        history.append({"type": "function_call_output", "call_id": call.call_id, "output": "Sunny, 21 degrees."})
        self.assertTrue(respond(input=history, tools=[WEATHER]).output)

    def test_an_answer_follows_a_model(self):
        answer = CLIENT.responses.parse(model="any", input="How is the weather? Answer in JSON.", text_format=Weather, max_output_tokens=200)
        self.assertIsInstance(answer.output_parsed, Weather)

    def test_what_would_need_a_store_is_refused(self):
        with self.assertRaises(openai.BadRequestError) as caught:
            respond(previous_response_id="resp_1")
        self.assertEqual(caught.exception.param, "previous_response_id")


class Embeddings(unittest.TestCase):
    def test_both_encodings_are_the_same_vectors(self):
        texts = ["The old lighthouse", "A tower by the sea"]
        by_default = CLIENT.embeddings.create(model="any", input=texts)  # the client asks for base64
        as_numbers = CLIENT.embeddings.create(model="any", input=texts, encoding_format="float")
        self.assertEqual([entry.index for entry in by_default.data], [0, 1])
        self.assertGreater(by_default.usage.prompt_tokens, 6)
        for a, b in zip(by_default.data, as_numbers.data, strict=True):
            self.assertLess(max(abs(x - y) for x, y in zip(a.embedding, b.embedding, strict=True)), 1e-4)

    def test_langchain_embeds_queries_and_documents(self):
        embeddings = OpenAIEmbeddings(model="any", base_url=f"{BASE}/v1", api_key="none", check_embedding_ctx_length=False)
        [one] = embeddings.embed_documents(["The old lighthouse"])
        self.assertEqual(len(one), len(embeddings.embed_query("A tower by the sea")))


class Errors(unittest.TestCase):
    def test_a_bad_field_is_named(self):
        with self.assertRaises(openai.BadRequestError) as caught:
            chat(temperature=3)
        self.assertEqual((caught.exception.param, caught.exception.type), ("temperature", "invalid_request_error"))
        self.assertIn("from 0 to 2", caught.exception.body["message"])

    def test_what_is_not_supported_is_refused(self):
        with self.assertRaises(openai.BadRequestError) as caught:
            chat(functions=[{"name": "f"}])
        self.assertEqual(caught.exception.param, "functions")

    def test_a_prompt_that_is_too_long_is_refused_with_its_length(self):
        with self.assertRaises(openai.BadRequestError) as caught:
            complete(prompt="word " * 3000)
        self.assertIn("tokens", caught.exception.body["message"])

    def test_a_path_that_is_not_there_is_not_found(self):
        with self.assertRaises(openai.NotFoundError):
            CLIENT.moderations.create(input="x")


if __name__ == "__main__":
    unittest.main(verbosity=2)
