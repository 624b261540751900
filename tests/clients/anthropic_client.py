"""Anthropic's own client against a running server: anthropic_client.py BASE_URL. tests/messages.rs runs it."""
import sys
import unittest
from typing import Literal

import anthropic
from pydantic import BaseModel

BASE = sys.argv.pop(1)
CLIENT = anthropic.Anthropic(base_url=BASE, api_key="none", max_retries=0, timeout=120)
ASKED = {"model": "any", "max_tokens": 16, "system": "Be brief.",
         "messages": [{"role": "user", "content": "Name three colours."}],
         "extra_body": {"temperature": 0}}  # the client has no argument for it any more
WEATHER = {
    "name": "get_weather", "description": "The weather in a city.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string", "maxLength": 12}}, "required": ["city"]},
}
CALL = {"tools": [WEATHER], "tool_choice": {"type": "any", "disable_parallel_tool_use": True}, "max_tokens": 100,
        "messages": [{"role": "user", "content": "How is the weather in Paris?"}]}


def create(**more):
    message = CLIENT.messages.create(**{**ASKED, **more})
    type(message).model_validate(message.model_dump(), strict=True)  # the client itself takes anything
    return message


class Messages(unittest.TestCase):
    def test_an_answer_has_text_reason_and_counts(self):
        message = create()
        (block,) = message.content
        self.assertTrue(block.type == "text" and block.text and message.stop_reason in ("end_turn", "max_tokens"))
        self.assertLessEqual(message.usage.output_tokens, 16)

    def test_a_stream_is_the_same_message(self):
        with CLIENT.messages.stream(**ASKED) as stream:
            text = "".join(stream.text_stream)
            message = stream.get_final_message()
        (block,) = message.content
        self.assertEqual((text, text), (block.text, create().content[0].text))
        self.assertGreater(message.usage.input_tokens + message.usage.cache_read_input_tokens, 0)

    def test_tokens_are_counted(self):
        asked = {name: ASKED[name] for name in ("model", "system", "messages")}
        count = CLIENT.messages.count_tokens(**asked).input_tokens
        usage = create().usage
        self.assertEqual(count, usage.input_tokens + usage.cache_read_input_tokens)

    def test_a_tool_is_called_and_its_result_read(self):
        message = create(**CALL)
        self.assertEqual(message.stop_reason, "tool_use")
        (call,) = [block for block in message.content if block.type == "tool_use"]
        self.assertTrue(call.name == "get_weather" and isinstance(call.input["city"], str))
        with CLIENT.messages.stream(**{**ASKED, **CALL}) as stream:
            streamed = stream.get_final_message()
        self.assertEqual([b.input for b in streamed.content if b.type == "tool_use"], [call.input])
        result = {"type": "tool_result", "tool_use_id": call.id, "content": "Sunny, 21 degrees."}
        history = [*CALL["messages"], {"role": "assistant", "content": message.content}, {"role": "user", "content": [result]}]
        self.assertTrue(create(tools=[WEATHER], messages=history).content)

    def test_an_answer_follows_a_model(self):
        class Weather(BaseModel):
            sky: Literal["clear", "cloudy"]
            degrees: int

        parsed = CLIENT.messages.parse(**{**ASKED, "max_tokens": 60}, output_format=Weather)
        self.assertIsInstance(parsed.parsed_output, Weather)

    def test_errors_are_of_their_kind(self):
        with self.assertRaises(anthropic.BadRequestError) as caught:
            create(max_tokens=-1)
        self.assertEqual(caught.exception.body["error"]["type"], "invalid_request_error")
        self.assertIn("max_tokens", caught.exception.message)
        with self.assertRaises(anthropic.NotFoundError):
            CLIENT.messages.batches.list()


if __name__ == "__main__":
    unittest.main(verbosity=2)
