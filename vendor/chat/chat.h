// llama.cpp's `common/chat` as C functions: a chat template makes a prompt of messages and tools, a
// grammar that holds the model to the template's way of calling tools, and a parser that makes a
// message of what the model wrote.
//
// Strings are UTF-8 and end with a zero byte; those returned belong to the caller, who gives them
// to medusa_chat_string_free. A function that fails returns null and stores a message in *error.
// Any thread may call any function; a medusa_chat and a medusa_chat_parser are never changed, so
// that threads may share one. Nothing is written to stdout or stderr.

#pragma once

#include <stdbool.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct medusa_chat medusa_chat;
typedef struct medusa_chat_parser medusa_chat_parser;

// A template in Jinja. bos and eos are the texts of those tokens, empty or null if there are none.
// The prompt has bos wherever the template writes it.
medusa_chat* medusa_chat_new(const char* template_source, const char* bos, const char* eos,
                             char** error);
void medusa_chat_free(medusa_chat* chat);

// What the template can express:
//
//   {"supports_tools", "supports_tool_calls", "supports_parallel_tool_calls",
//    "supports_system_role", "supports_string_content", "supports_typed_content",
//    "supports_object_arguments", "supports_preserve_reasoning", "supports_reasoning_effort",
//    "supports_thinking": bool}
char* medusa_chat_capabilities(const medusa_chat* chat, char** error);

// Makes a prompt. The request, in which all but the messages may be left out or null:
//
//   {"messages": [as OpenAI has them; also "reasoning_content" of the assistant],
//    "tools": [as OpenAI has them],
//    "tool_choice": "auto" | "none" | "required",            ("auto")
//    "parallel_tool_calls": bool,                            (if the template has them)
//    "json_schema": the schema that the answer must follow; {} stands for any object,
//    "enable_thinking": bool,                                (true)
//    "reasoning_format": "none" | "auto" | "deepseek" | "deepseek-legacy",  ("auto")
//    "add_generation_prompt": bool,                          (true)
//    "continue_final_message": bool | "content" | "reasoning_content",      (false)
//    "chat_template_kwargs": {name: a value for the template; "enable_thinking" of these comes
//                             before the one above},
//    "now": seconds since 1970                               (the time of the call)}
//
// The result:
//
//   {"prompt": string,
//    "grammar": GBNF, or "" if any text will do,
//    "grammar_lazy": bool,       the grammar holds from a trigger on, not from the start
//    "grammar_triggers": [{"type": "word" | "pattern" | "pattern_full" | "token",
//                          "value": string, "token": number, for "token" only}],
//    "preserved_tokens": [string],      special tokens that the output must show as text
//    "additional_stops": [string],      where the output ends, if not with an end of generation
//    "generation_prompt": string,       the end of the prompt, where the model's turn has begun
//    "supports_thinking": bool,
//    "thinking_start_tag": string, "thinking_end_tags": [string],
//    "message_delimiters": [{"role", "delimiter"}],
//    "syntax": {"format", "generation_prompt", "parser"}}    for medusa_chat_parser_new
char* medusa_chat_apply(const medusa_chat* chat, const char* request, char** error);

// A parser for the answers to one request.
medusa_chat_parser* medusa_chat_parser_new(const char* syntax, char** error);
void medusa_chat_parser_free(medusa_chat_parser* parser);

// Parses all that the model has written so far, without the prompt. The result:
//
//   {"content": string, "reasoning_content": string,
//    "tool_calls": [{"id": string, may be empty, "name": string, "arguments": string}]}
//
// With is_partial, more may follow: what could be the start of a tag or of a character is held
// back, and the last call's arguments are as far as they have come. Then no text is an error; where
// it does not follow the grammar, the message may be empty after it was not, and the one before
// holds. Without, a text that does not follow the grammar is an error.
char* medusa_chat_parse(const medusa_chat_parser* parser, const char* text, bool is_partial,
                        char** error);

void medusa_chat_string_free(char* string);

#ifdef __cplusplus
}
#endif
