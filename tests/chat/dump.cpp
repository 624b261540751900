// Writes the cases of llama.cpp's tests/test-chat.cpp as lines of JSON, instead of testing them.
// scripts/chat-cases cuts that file into data.inc, tester.inc and cases.inc, compiles this file with
// them, and links it with the library of vendor/chat.
//
// usage: dump FOLDER-OF-TEMPLATES >cases.jsonl

#include "chat-auto-parser.h"
#include "chat.h"
#include "common.h"
#include "json.h"
#include "log.h"

#include <algorithm>
#include <cassert>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <iostream>
#include <iterator>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "vendor/chat/chat.h"

using json = common_json;

// Tools, messages, and what a case is.
#include "data.inc"

// The cases can be those of one template only; here they are all.
static std::string g_template_filter;

static std::string g_folder;
static std::map<const common_chat_templates*, std::string> g_names;

static std::string read_file(const std::string& path) {
    const std::string name = path.substr(path.rfind('/') + 1);
    std::ifstream file(g_folder + "/" + name, std::ios::binary);
    if (!file) {
        throw std::runtime_error("no template " + name);
    }
    return {std::istreambuf_iterator<char>(file), {}};
}

static common_chat_templates_ptr read_templates(const std::string& path) {
    auto templates = common_chat_templates_ptr(common_chat_templates_init(nullptr, read_file(path)));
    const std::string file = path.substr(path.rfind('/') + 1);
    g_names[templates.get()] = file.substr(0, file.rfind(".jinja"));
    return templates;
}

// As medusa_chat_apply takes it.
static json request_of(const common_chat_templates_inputs& inputs) {
    static const char* const CHOICES[] = {"auto", "required", "none"};
    json messages = json::array();
    for (const auto& message : inputs.messages) {
        json written = message.to_json_oaicompat(false);
        if (!message.content_parts.empty()) { // which would become one text
            json parts = json::array();
            for (const auto& part : message.content_parts) {
                parts.push_back(json{{"type", part.type}, {"text", part.text}});
            }
            written["content"] = parts;
        }
        messages.push_back(written);
    }
    json request = {
        {"messages", messages},
        {"tool_choice", CHOICES[inputs.tool_choice]},
        {"parallel_tool_calls", inputs.parallel_tool_calls},
        {"enable_thinking", inputs.enable_thinking},
        {"reasoning_format", common_reasoning_format_name(inputs.reasoning_format)},
        {"add_generation_prompt", inputs.add_generation_prompt},
    };
    if (!inputs.tools.empty()) {
        request["tools"] = common_chat_tools_to_json_oaicompat(inputs.tools);
    }
    switch (inputs.continue_final_message) {
    case COMMON_CHAT_CONTINUATION_NONE: break;
    case COMMON_CHAT_CONTINUATION_AUTO: request["continue_final_message"] = true; break;
    case COMMON_CHAT_CONTINUATION_CONTENT: request["continue_final_message"] = "content"; break;
    case COMMON_CHAT_CONTINUATION_REASONING:
        request["continue_final_message"] = "reasoning_content";
        break;
    }
    if (!inputs.json_schema.empty()) {
        request["json_schema"] = json::parse(inputs.json_schema);
    }
    json variables = json::object();
    for (const auto& [name, value] : inputs.chat_template_kwargs) {
        variables[name] = json::parse(value);
    }
    if (!variables.empty()) {
        request["chat_template_kwargs"] = variables;
    }
    return request;
}

// As medusa_chat_parse returns it.
static json answer_of(const common_chat_msg& message) {
    json calls = json::array();
    for (const auto& call : message.tool_calls) {
        calls.push_back(
            json{{"id", call.id}, {"name", call.name}, {"arguments", call.arguments}});
    }
    return {
        {"content", message.render_content()},
        {"reasoning_content", message.reasoning_content},
        {"tool_calls", calls},
    };
}

// In place of the test of a case.
static void test_peg_parser(common_chat_templates* templates,
                            const std::function<void(peg_test_case&)>& fill, bool) {
    peg_test_case example;
    fill(example);
    if (example.params.messages.empty()) {
        example.params.messages = {message_user};
    }
    const json line = {
        {"template", g_names.at(templates)},
        {"request", request_of(example.params)},
        {"text", example.input},
        {"is_partial", example.is_partial},
        {"expected", answer_of(example.expect)},
    };
    std::cout << line.dump_safe() << "\n";
}

// Between the cases are a few checks of prompts: they go through our functions, too. Directly,
// llama.cpp's would lack what those have set up.
static common_chat_params applied(const common_chat_templates* templates,
                                  const common_chat_templates_inputs& inputs) {
    char* error = nullptr;
    const auto checked = [&](auto* result) {
        if (!result) {
            throw std::runtime_error(g_names.at(templates) + ": " + error);
        }
        return result;
    };
    const std::string source = common_chat_templates_source(templates);
    medusa_chat* chat = checked(medusa_chat_new(source.c_str(), "", "", &error));
    const std::string request = request_of(inputs).dump();
    char* result = checked(medusa_chat_apply(chat, request.c_str(), &error));
    common_chat_params params;
    params.prompt = json::parse(result).at("prompt").get<std::string>();
    medusa_chat_string_free(result);
    medusa_chat_free(chat);
    return params;
}
#define common_chat_templates_apply applied

#include "tester.inc"

#include "cases.inc"

int main(int, char** arguments) {
    g_folder = arguments[1];
    try {
        test_template_output_peg_parsers(false);
    } catch (const std::exception& e) {
        std::cerr << e.what() << "\n";
        return EXIT_FAILURE;
    }
    return std::cout.flush() ? EXIT_SUCCESS : EXIT_FAILURE;
}
