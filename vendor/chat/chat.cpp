// The functions of chat.h, and in the same translation unit the upper half of llama.cpp's
// `common/chat`: templates and parsers. jinja.cpp has the lower half.

#include "inside.h"

#include "common/chat-auto-parser-generator.cpp"
#include "common/chat-auto-parser-helpers.cpp"
#include "common/chat-diff-analyzer.cpp"
#include "common/chat-peg-parser.cpp"

// Analysing a template renders it dozens of times. Once will do; common/chat.cpp does it for each
// prompt.
const autoparser::autoparser& medusa_analysis(const common_chat_template& source);
#define analyze_template(source) operator=(medusa_analysis(source))
#include "common/chat.cpp"
#undef analyze_template

#include "common/parsers/cohere2moe.cpp"
#include "common/parsers/deepseek.cpp"
#include "common/parsers/functionary-v3-2.cpp"
#include "common/parsers/gemma4.cpp"
#include "common/parsers/gigachat-v3.cpp"
#include "common/parsers/gpt-oss.cpp"
#include "common/parsers/kimi-k2.cpp"
#include "common/parsers/kimi-k3.cpp"
#include "common/parsers/lfm2.cpp"
#include "common/parsers/ling3.cpp"
#include "common/parsers/llm-jp-harmony.cpp"
#include "common/parsers/minicpm5.cpp"
#include "common/parsers/minimax-m3.cpp"
#include "common/parsers/ministral3.cpp"
#include "common/parsers/muse-glimmer.cpp"
#include "common/parsers/parsers.cpp"
#include "common/parsers/qwen3-coder.cpp"
#include "common/peg-parser.cpp"

#undef fprintf
#undef localtime

#include <pthread.h>

#include <cstring>
#include <mutex>

#include "chat.h"

struct medusa_chat {
    common_chat_templates_ptr templates;

    mutable std::mutex mutex; // for the analysis
    mutable autoparser::autoparser analysis;
};

struct medusa_chat_parser {
    common_chat_parser_params params;
};

namespace {

// JSON may be nested this deep in a request; llama.cpp recurses for each level.
constexpr int MAX_LEVELS = 512;

// The stack that parsing may take for each level of what the model wrote, thrice what it takes at
// -O1; the levels for which the caller's stack is large enough; and how large one may become.
constexpr size_t LEVEL_BYTES = 8192;
constexpr size_t FEW_LEVELS = 64;
constexpr size_t MAX_STACK = 512 << 20;

// For a call's thread: the template, and the time that it is told.
thread_local const medusa_chat* CHAT;
thread_local std::optional<std::time_t> TIME;

char* copied(const std::string& text) {
    char* copy = (char*)malloc(text.size() + 1);
    if (copy) {
        memcpy(copy, text.c_str(), text.size() + 1);
    }
    return copy;
}

// What body returns, or null and a message in *error.
template <typename Body>
auto guarded(char** error, const Body& body) -> decltype(body()) {
    try {
        return body();
    } catch (const std::exception& e) {
        *error = copied(e.what());
    } catch (...) {
        *error = copied("unknown error");
    }
    return nullptr;
}

void check_levels(const std::string& text) {
    int level = 0;
    bool in_string = false;
    for (size_t i = 0; i < text.size(); i++) {
        const char c = text[i];
        if (c == '"') {
            in_string = !in_string;
        } else if (in_string) {
            i += c == '\\';
        } else if (c == '[' || c == '{') {
            if (++level > MAX_LEVELS) {
                throw std::invalid_argument("JSON is nested too deeply");
            }
        } else if (c == ']' || c == '}') {
            level--;
        }
    }
}

// Calls body on a stack that is large enough to parse text: the parsers recurse for each array or
// object in another.
template <typename Body>
void on_large_stack(const std::string& text, const Body& body) {
    const size_t levels =
        std::count_if(text.begin(), text.end(), [](char c) { return c == '[' || c == '{'; });
    if (levels <= FEW_LEVELS) {
        body();
        return;
    }
    const size_t size = (FEW_LEVELS + levels) * LEVEL_BYTES;
    if (size > MAX_STACK) {
        throw std::invalid_argument("the text has too many brackets");
    }

    struct Call {
        const Body& body;
        std::exception_ptr failure;
    } call = {body, nullptr};
    const auto run = [](void* data) -> void* {
        Call& call = *(Call*)data;
        try {
            call.body();
        } catch (...) {
            call.failure = std::current_exception();
        }
        return nullptr;
    };
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, size);
    pthread_t thread;
    const int status = pthread_create(&thread, &attributes, run, &call);
    pthread_attr_destroy(&attributes);
    if (status != 0) {
        throw std::runtime_error("no thread to parse on");
    }
    pthread_join(thread, nullptr);
    if (call.failure) {
        std::rethrow_exception(call.failure);
    }
}

// A field of the request, or null if it has none.
const json& field(const json& request, const std::string& name) {
    static const json null;
    return request.contains(name) ? request.at(name) : null;
}

bool flag(const json& request, const std::string& name, bool missing) {
    const json& value = field(request, name);
    if (value.is_null()) {
        return missing;
    }
    if (!value.is_boolean()) {
        throw std::invalid_argument("'" + name + "' must be a boolean");
    }
    return value.get<bool>();
}

std::string word(const json& request, const std::string& name, const char* missing) {
    const json& value = field(request, name);
    if (value.is_null()) {
        return missing;
    }
    if (!value.is_string()) {
        throw std::invalid_argument("'" + name + "' must be a string");
    }
    return value.get<std::string>();
}

// As llama-server makes them of a request.
common_chat_templates_inputs inputs_of(const common_chat_templates* templates,
                                       const json& request) {
    if (!request.is_object()) {
        throw std::invalid_argument("the request must be an object");
    }
    common_chat_templates_inputs inputs;
    inputs.messages = common_chat_msgs_parse_oaicompat(field(request, "messages"));
    for (const auto& message : inputs.messages) {
        if (message.role == "tool") {
            check_levels(message.content); // a template may read it as JSON
        }
        for (const auto& call : message.tool_calls) {
            check_levels(call.arguments);
        }
    }
    inputs.tools = common_chat_tools_parse_oaicompat(field(request, "tools"));
    inputs.tool_choice =
        common_chat_tool_choice_parse_oaicompat(word(request, "tool_choice", "auto"));
    inputs.parallel_tool_calls =
        flag(request, "parallel_tool_calls",
             common_chat_templates_get_caps(templates)["supports_parallel_tool_calls"]);
    inputs.enable_thinking = flag(request, "enable_thinking", true);
    inputs.reasoning_format =
        common_reasoning_format_from_name(word(request, "reasoning_format", "auto"));
    inputs.add_generation_prompt = flag(request, "add_generation_prompt", true);

    const json& schema = field(request, "json_schema");
    if (!schema.is_null()) {
        inputs.json_schema =
            schema.is_object() && schema.empty() ? R"({"type": "object"})" : schema.dump();
    }

    inputs.continue_final_message =
        common_chat_continuation_parse(field(request, "continue_final_message"));
    if (inputs.continue_final_message != COMMON_CHAT_CONTINUATION_NONE) {
        if (inputs.messages.empty() || inputs.messages.back().role != "assistant") {
            throw std::invalid_argument("the message to continue must be the assistant's");
        }
        if (!inputs.messages.back().tool_calls.empty()) {
            throw std::invalid_argument("a message with tool calls cannot be continued");
        }
    }

    const json& arguments = field(request, "chat_template_kwargs");
    if (!arguments.is_null() && !arguments.is_object()) {
        throw std::invalid_argument("'chat_template_kwargs' must be an object");
    }
    for (const auto& [name, value] : arguments.items()) {
        inputs.chat_template_kwargs[name] = value.dump();
    }
    inputs.enable_thinking = flag(arguments, "enable_thinking", inputs.enable_thinking);
    return inputs;
}

json triggers_of(const common_chat_params& params) {
    static const char* const TYPES[] = {"token", "word", "pattern", "pattern_full"};
    json triggers = json::array();
    for (const auto& trigger : params.grammar_triggers) {
        json entry = {{"type", TYPES[trigger.type]}, {"value", trigger.value}};
        if (trigger.type == COMMON_GRAMMAR_TRIGGER_TYPE_TOKEN) {
            entry["token"] = trigger.token;
        }
        triggers.push_back(entry);
    }
    return triggers;
}

json result_of(const common_chat_params& params) {
    return {
        {"prompt", params.prompt},
        {"grammar", params.grammar},
        {"grammar_lazy", params.grammar_lazy},
        {"grammar_triggers", triggers_of(params)},
        {"preserved_tokens", params.preserved_tokens},
        {"additional_stops", params.additional_stops},
        {"generation_prompt", params.generation_prompt},
        {"supports_thinking", params.supports_thinking},
        {"thinking_start_tag", params.thinking_start_tag},
        {"thinking_end_tags", params.thinking_end_tags},
        {"message_delimiters", params.message_delimiters.to_json()},
        {"syntax",
         {
             {"format", common_chat_format_name(params.format)},
             {"generation_prompt", params.generation_prompt},
             {"parser", params.parser},
         }},
    };
}

common_chat_format format_of(const std::string& name) {
    for (int format = 0; format < COMMON_CHAT_FORMAT_COUNT; format++) {
        if (name == common_chat_format_name((common_chat_format)format)) {
            return (common_chat_format)format;
        }
    }
    throw std::invalid_argument("unknown format: " + name);
}

json message_of(const common_chat_msg& message) {
    json calls = json::array();
    for (const auto& call : message.tool_calls) {
        calls.push_back({{"id", call.id}, {"name", call.name}, {"arguments", call.arguments}});
    }
    return {
        {"content", message.render_content()},
        {"reasoning_content", message.reasoning_content},
        {"tool_calls", calls},
    };
}

} // namespace

medusa_chat* medusa_chat_new(const char* template_source, const char* bos, const char* eos,
                             char** error) {
    return guarded(error, [&] {
        if (template_source[0] == 0) {
            throw std::invalid_argument("the template is empty");
        }
        auto chat = std::make_unique<medusa_chat>();
        try {
            chat->templates = common_chat_templates_init(nullptr, template_source, bos ? bos : "",
                                                         eos ? eos : "");
        } catch (const std::exception&) {
            // What was wrong is lost there; here it is thrown again.
            common_chat_template(template_source, "", "");
            throw;
        }
        return chat.release();
    });
}

void medusa_chat_free(medusa_chat* chat) { delete chat; }

char* medusa_chat_capabilities(const medusa_chat* chat, char** error) {
    return guarded(error, [&] {
        json capabilities = common_chat_templates_get_caps(chat->templates.get());
        CHAT = chat;
        TIME.reset();
        try {
            capabilities["supports_thinking"] =
                common_chat_templates_support_enable_thinking(chat->templates.get());
        } catch (const std::exception&) {
            capabilities["supports_thinking"] = false;
        }
        return copied(capabilities.dump_safe());
    });
}

char* medusa_chat_apply(const medusa_chat* chat, const char* request, char** error) {
    return guarded(error, [&] {
        check_levels(request);
        const json parsed = json::parse(request);
        const auto inputs = inputs_of(chat->templates.get(), parsed);
        const json& now = field(parsed, "now");
        if (!now.is_null() && !now.is_number_integer()) {
            throw std::invalid_argument("'now' must be an integer");
        }
        CHAT = chat;
        TIME = now.is_null() ? std::nullopt : std::optional(now.get<long>());
        const auto params = common_chat_templates_apply(chat->templates.get(), inputs);
        return copied(result_of(params).dump_safe());
    });
}

medusa_chat_parser* medusa_chat_parser_new(const char* syntax, char** error) {
    return guarded(error, [&] {
        const json parsed = json::parse(syntax);
        auto parser = std::make_unique<medusa_chat_parser>();
        parser->params.format = format_of(parsed.at("format"));
        parser->params.generation_prompt = parsed.at("generation_prompt").get<std::string>();
        const std::string rules = parsed.at("parser");
        if (!rules.empty()) {
            parser->params.parser.load(rules);
        }
        return parser.release();
    });
}

void medusa_chat_parser_free(medusa_chat_parser* parser) { delete parser; }

char* medusa_chat_parse(const medusa_chat_parser* parser, const char* text, bool is_partial,
                        char** error) {
    return guarded(error, [&] {
        std::string message;
        try {
            const std::string input = text;
            on_large_stack(input, [&] {
                message =
                    message_of(common_chat_parse(input, is_partial, parser->params)).dump_safe();
            });
        } catch (const std::exception&) {
            if (!is_partial) {
                throw;
            }
            message = message_of({}).dump_safe();
        }
        return copied(message);
    });
}

void medusa_chat_string_free(char* string) { free(string); }

const autoparser::autoparser& medusa_analysis(const common_chat_template& source) {
    const std::lock_guard<std::mutex> lock(CHAT->mutex);
    if (!CHAT->analysis.analysis_complete) {
        autoparser::autoparser analysis;
        analysis.analyze_template(source);
        CHAT->analysis = analysis;
    }
    return CHAT->analysis;
}

std::tm* medusa_local_time(const std::time_t* time) {
    static thread_local std::tm local;
    const std::time_t shown = TIME.value_or(*time);
    localtime_r(&shown, &local);
    return &local;
}

// What llama.cpp's common.cpp and log.cpp define and the sources above call; those two need much
// more. Nothing is logged, and no template comes from a model.

int common_log_get_verbosity_thold() { return -1; }
common_log* common_log_main() { return nullptr; }
void common_log_add(common_log*, ggml_log_level, const char*, ...) {}

std::vector<llama_token> common_tokenize(const llama_vocab*, const std::string&, bool, bool) {
    throw std::logic_error("no vocabulary");
}

std::string common_token_to_piece(const llama_vocab*, llama_token, bool) {
    throw std::logic_error("no vocabulary");
}

void string_replace_all(std::string& text, const std::string& search, const std::string& replace) {
    if (search.empty()) {
        return;
    }
    for (size_t at = 0; (at = text.find(search, at)) != std::string::npos; at += replace.size()) {
        text.replace(at, search.size(), replace);
    }
}

std::string string_join(const std::vector<std::string>& values, const std::string& separator) {
    std::string joined;
    for (size_t i = 0; i < values.size(); i++) {
        joined += (i ? separator : "") + values[i];
    }
    return joined;
}

std::vector<std::string> string_split(const std::string& text, const std::string& delimiter) {
    if (delimiter.empty()) {
        throw std::invalid_argument("empty separator");
    }
    std::vector<std::string> parts;
    size_t start = 0, end;
    while ((end = text.find(delimiter, start)) != std::string::npos) {
        parts.push_back(text.substr(start, end - start));
        start = end + delimiter.size();
    }
    parts.push_back(text.substr(start));
    return parts;
}

std::string string_repeat(const std::string& text, size_t n) {
    std::string repeated;
    while (n-- > 0) {
        repeated += text;
    }
    return repeated;
}
