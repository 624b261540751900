"""OpenAI's Agents SDK against a running server: agents_client.py BASE_URL. tests/openai.rs runs it.

Each run is a whole loop: the model must call a tool, the SDK calls the function and sends its result, and the model answers in text.
"""
import sys
import unittest
from typing import Annotated, Literal

from agents import (
    Agent, ModelSettings, OpenAIChatCompletionsModel, OpenAIResponsesModel, RunConfig, Runner, ToolCallItem, ToolCallOutputItem,
    function_tool, set_tracing_disabled,
)
from openai import AsyncOpenAI
from pydantic import BaseModel, Field

BASE = sys.argv.pop(1)
MODELS = (OpenAIChatCompletionsModel, OpenAIResponsesModel)
NO_TRACES = RunConfig(tracing_disabled=True)  # they would go to OpenAI
set_tracing_disabled(True)


class Weather(BaseModel):
    sky: Literal["clear", "cloudy"]
    degrees: int = Field(ge=-40, le=50)


def agent(model, called, **more):
    """An agent whose functions note how they were called."""

    @function_tool
    def get_weather(city: Annotated[str, Field(max_length=12)], unit: Literal["celsius", "fahrenheit"]) -> str:
        """The weather in a city."""
        called.append(("get_weather", city, unit))
        return f"Sunny in {city}, 21 degrees."

    @function_tool
    def add(a: Annotated[int, Field(ge=0, le=999)], b: Annotated[int, Field(ge=0, le=999)]) -> str:
        """The sum of two numbers."""
        called.append(("add", a, b))
        return str(a + b)

    settings = ModelSettings(tool_choice="required", temperature=0, max_tokens=100, parallel_tool_calls=False, include_usage=True)
    client = AsyncOpenAI(base_url=f"{BASE}/v1", api_key="none", max_retries=0, timeout=120)
    return Agent(**{
        "name": "Helper", "instructions": "Be brief.", "tools": [get_weather, add], "model_settings": settings,
        "model": model("any", openai_client=client), **more,
    })


class Loops(unittest.IsolatedAsyncioTestCase):
    def check(self, run, called):
        """A function has run with valid arguments, its result was sent, and an answer in text followed."""
        self.assertTrue(called)
        for name, *arguments in called:
            if name == "get_weather":
                city, unit = arguments
                self.assertTrue(len(city) <= 12 and unit in ("celsius", "fahrenheit"), called)
            else:
                self.assertTrue(all(type(n) is int and 0 <= n <= 999 for n in arguments), called)
        kinds = [type(item) for item in run.new_items]
        self.assertEqual((kinds.count(ToolCallItem), kinds.count(ToolCallOutputItem)), (len(called), len(called)))
        self.assertEqual(kinds[0], ToolCallItem)
        self.assertTrue(isinstance(run.final_output, str) and run.final_output)
        self.assertGreaterEqual(len(run.raw_responses), 2)
        usage = run.context_wrapper.usage
        self.assertEqual(usage.requests, len(run.raw_responses))
        self.assertTrue(usage.input_tokens > 0 and usage.output_tokens > 0)

    async def test_a_function_is_called_and_an_answer_follows(self):
        for model in MODELS:
            with self.subTest(model.__name__):
                called = []
                run = await Runner.run(agent(model, called), "How is the weather in Paris?", max_turns=4, run_config=NO_TRACES)
                self.check(run, called)

    async def test_a_stream_is_the_same_run(self):
        for model in MODELS:
            with self.subTest(model.__name__):
                called, expected = [], []
                whole = await Runner.run(agent(model, expected), "Add 2 and 3.", max_turns=4, run_config=NO_TRACES)
                run = Runner.run_streamed(agent(model, called), "Add 2 and 3.", max_turns=4, run_config=NO_TRACES)
                deltas, names = [], []
                async for event in run.stream_events():
                    if event.type == "raw_response_event" and event.data.type == "response.output_text.delta":
                        deltas.append(event.data.delta)
                    elif event.type == "run_item_stream_event":
                        names.append(event.name)
                self.check(run, called)
                self.assertEqual((called, run.final_output), (expected, whole.final_output))
                self.assertTrue("".join(deltas).endswith(run.final_output), deltas)
                self.assertEqual(names[:2] + names[-1:], ["tool_called", "tool_output", "message_output_created"])

    async def test_an_output_follows_its_type(self):
        settings = ModelSettings(temperature=0, max_tokens=100)
        for model in MODELS:
            with self.subTest(model.__name__):
                asked = agent(model, [], tools=[], model_settings=settings, output_type=Weather)
                run = await Runner.run(asked, "How is the weather? Answer in JSON.", run_config=NO_TRACES)
                self.assertIsInstance(run.final_output, Weather)


if __name__ == "__main__":
    unittest.main(verbosity=2)
