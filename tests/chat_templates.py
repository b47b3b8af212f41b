"""Chat templates made for the tests, one for each pattern of real ones, and by hand what is to be trained on."""

import json
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEXT = [
    "Hello there, how are you? Well, I am well.\n\nassistant\n\nuser\n\nsystem\n\ntool\n\nthink call",
    "Sunny. It is sunny in Paris, and in Rome. name arguments city weather final analysis",
]
SPECIAL = [
    *("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>", "<|system|>", "<|tool|>", "<|end|>"),
    *("<|eom|>", "<|call|>", "<|return|>", "<|start|>", "<|channel|>", "<|message|>", "<CALLS>", "</CALLS>"),
    *("<|reply|>", "<|/reply|>", "[INST]", "[/INST]", "<|sep|>"),
]
SOFT = ["<think>", "</think>", "<call>", "</call>"]


@cache
def _vocabulary() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    return tokenizer.to_str()


def make_tokenizer(template: str | dict[str, str], strip: str = "", eos: str = "</s>") -> PreTrainedTokenizerFast:
    """A tokenizer with a chat template; `strip` names the sides on which <|end|> swallows spaces, "r" and "l"."""
    tokenizer = Tokenizer.from_str(_vocabulary())
    sides = {"rstrip": "r" in strip, "lstrip": "l" in strip}
    tokenizer.add_special_tokens(
        [AddedToken(name, normalized=False, **(sides if name == "<|end|>" else {})) for name in SPECIAL]
    )
    tokenizer.add_tokens([AddedToken(name, normalized=False) for name in SOFT])
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token=eos)
    made.chat_template = template
    return made


def user(content: Any = "Hello") -> dict[str, Any]:
    return {"role": "user", "content": content}


def says(content: Any = "Well", reasoning: str | None = None, *cities: str) -> dict[str, Any]:
    """An assistant message that may think, and call the weather of some cities."""
    message = {"role": "assistant", "content": content}
    if reasoning:
        message["reasoning_content"] = reasoning
    if cities:
        message["tool_calls"] = [{"type": "function", "function": call(city)} for city in cities]
    return message


def call(city: str) -> dict[str, Any]:
    return {"name": "weather", "arguments": {"city": city}}


def written(city: str) -> str:
    return json.dumps(call(city))


SYSTEM = {"role": "system", "content": "Be kind."}
DEVELOPER = {"role": "developer", "content": "Be kind."}
RESULT = {"role": "tool", "content": "sunny"}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]
ONE, TWO = [user(), says()], [user(), says(), user("How?"), says("Fine")]
CALL, AFTER = [user(), says(None, None, "Paris")], [user(), says(None, None, "Paris"), RESULT, says("Sunny.")]
THOUGHT = [user(), says("Well", "Hm."), user("How?"), says("Fine", "So.")]


@dataclass(frozen=True)
class Case:
    """A chat with what is trained on, row by row and answer by answer, and what is left out.

    Args:
        messages: the chat.
        rows: for each row the text of each run of tokens that is trained on.
        left_out: for each assistant turn that isn't, by its index, a part of the reason.
        kwargs: variables for the template.
    """

    messages: list[dict[str, Any]]
    rows: list[list[str]]
    left_out: dict[int, str] = field(default_factory=dict)
    kwargs: dict[str, Any] = field(default_factory=dict)
    tools: list[dict[str, Any]] | None = None


@dataclass(frozen=True)
class Pattern:
    template: str
    cases: list[Case]
    strip: str = ""
    eos: str = "</s>"


PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}" + PROMPT
CUTS = CHATML.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}")
CALLS = "{% for c in m.tool_calls %}<call>{{ c.function | tojson }}</call>{% endfor %}"
TOOL_CHATML = CHATML.replace("{{ m.content }}", "{{ m.content or '' }}" + CALLS)
THINKS = "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
THINKING = TOOL_CHATML.replace("{{ m.content or", THINKS + "{{ m.content or")
# This template shows reasoning only for the answers after the last question.
FORGETS = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}"
) + THINKING.replace("{% if m.reasoning_content %}", "{% if m.reasoning_content and loop.index0 > ns.last %}")
PIPES = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# The end of a turn is the beginning of the next one.
OPEN = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content or '' }}" + CALLS + "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MARKED = CHATML.replace(
    "{{ m.content }}<|im_end|>",
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}"
    "{{ m.content }}<|im_end|>{% endif %}",
)
ALTERNATES = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
)
# The system prompt stands in the last user turn, as long as that is the last message.
MOVES = (
    "{% set ns = namespace(system='') %}{% for m in messages %}{% if m.role == 'system' %}"
    "{% set ns.system = m.content + '\n' %}{% elif m.role == 'user' %}"
    "[INST]{{ ns.system if loop.last else '' }}{{ m.content }}[/INST]{% else %} {{ m.content }}</s>{% endif %}"
    "{% endfor %}"
)
CHANNELS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% set later = namespace(final=false) %}{% for n in messages[loop.index:] %}"
    "{% if n.role == 'assistant' and not n.tool_calls %}{% set later.final = true %}{% endif %}{% endfor %}"
    "{% if m.reasoning_content and not later.final and (m.tool_calls or loop.last) %}"
    "<|start|>assistant<|channel|>analysis<|message|>{{ m.reasoning_content }}<|end|>{% endif %}"
    "{% if m.tool_calls %}<|start|>assistant<|channel|>call<|message|>{{ m.tool_calls[0].function | tojson }}<|call|>"
    "{% else %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}"
    "{{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}{% endif %}"
    "{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
END = "<|im_end|>"
IN_TEXT = [user(), says("<think>\nHm.\n</think>Well"), user(), says("<think>So.</think>Fine")]

PATTERNS: dict[str, Pattern] = {
    "plain": Pattern(
        CHATML,
        [
            Case(TWO, [["Well" + END, "Fine" + END]]),
            Case([SYSTEM, *TWO], [["Well" + END, "Fine" + END]]),
            Case([user(), says("a<|im_end|>b")], [["a<|im_end|>b" + END]]),
            Case([user(), says(""), user(), says(None), user(), says()], [["Well" + END]], {1: "empty", 3: "empty"}),
            Case([says(), user(), says("Fine")], [["Fine" + END]], {0: "speaks first"}),
            Case([user(), says(), says("Fine")], [["Well" + END, "Fine" + END]]),
            Case([user(), says("Well", "Hm."), *ONE], [["Well" + END]], {1: "does not show reasoning"}),
        ],
    ),
    "tool calls": Pattern(
        TOOL_CHATML,
        [
            Case(CALL, [[f"<call>{written('Paris')}</call>{END}"]]),
            Case([user(), says("Look:", None, "Rome")], [[f"Look:<call>{written('Rome')}</call>{END}"]]),
            Case(AFTER, [[f"<call>{written('Paris')}</call>{END}", "Sunny." + END]]),
            Case(
                [user(), says("", None, "Paris", "Rome")],
                [[f"<call>{written('Paris')}</call><call>{written('Rome')}</call>{END}"]],
            ),
        ],
    ),
    "reasoning": Pattern(THINKING, [Case(THOUGHT, [["<think>Hm.</think>Well" + END, "<think>So.</think>Fine" + END]])]),
    "reasoning of earlier turns is taken out": Pattern(
        FORGETS,
        [
            Case(THOUGHT, [["<think>Hm.</think>Well" + END], ["<think>So.</think>Fine" + END]]),
            Case(TWO, [["Well" + END, "Fine" + END]]),
        ],
    ),
    "the prompt opens a thought": Pattern(
        CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}"),
        [
            Case(ONE, [["Well" + END]]),
            Case([user(), says("<think>\nHm.</think>Well")], [["Hm.</think>Well" + END]]),
            Case([user(), says("<think>Hm.</think>Well")], [["<think>Hm.</think>Well" + END]]),
        ],
    ),
    "the prompt closes an empty thought": Pattern(
        CHATML.replace(
            "\n{{ m.content }}",
            "\n{{ '<think></think>' if loop.last and m.role == 'assistant' else '' }}{{ m.content }}",
        ).replace("assistant\n{% endif %}", "assistant\n<think></think>{% endif %}"),
        [Case(ONE, [["Well" + END]]), Case(TWO, [["Well" + END], ["Fine" + END]])],
    ),
    "the prompt thinks nothing, an answer begins after it": Pattern(
        "{% for m in messages %}<|{{ m.role }}|>{{ '</think>' if m.role == 'assistant' else '' }}{{ m.content }}"
        "{{ '</s>' if m.role == 'assistant' else '' }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|><think></think>{% endif %}",
        # The verifier is given <think></think>, so that is what stands before its answer.
        [Case(ONE, [["Well</s>"]])],
    ),
    "the prompt thinks, an answer closes the thought at once": Pattern(
        "{% for m in messages %}<|{{ m.role }}|>{{ '[/T]' if m.role == 'assistant' else '' }}{{ m.content }}"
        "{{ '</s>' if m.role == 'assistant' else '' }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>[T]{% endif %}",
        [Case(TWO, [["[/T]Well</s>", "[/T]Fine</s>"]])],
    ),
    "answers in a row are one turn": Pattern(
        "{% for m in messages %}{% set again = loop.index0 and messages[loop.index0 - 1].role == m.role %}"
        "{{ '' if again else '<|' + m.role + '|>' }}{{ m.content }}"
        "{{ '' if loop.index < messages | length and messages[loop.index].role == m.role else '<|end|>' }}"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}",
        [
            Case(TWO, [["Well<|end|>", "Fine<|end|>"]]),
            Case([user(), says(), says("Fine")], [["Well<|end|>", "Fine<|end|>"]]),
        ],
    ),
    "a variable switches thinking off": Pattern(
        CHATML.replace(
            "assistant\n{% endif %}",
            "assistant\n{% if enable_thinking is false %}<think></think>{% endif %}{% endif %}",
        ).replace(
            "{{ m.content }}",
            "{% if loop.last and m.role == 'assistant' %}<think></think>{% endif %}{{ m.content }}",
        ),
        [
            Case(ONE, [["<think></think>Well" + END]]),
            Case(ONE, [["Well" + END]], kwargs={"enable_thinking": False}),
        ],
    ),
    "the end of turn swallows the line break after it": Pattern(
        PIPES, [Case(TWO, [["Well<|end|>", "Fine<|end|>"]])], strip="r"
    ),
    "the end of turn swallows the line break before it": Pattern(
        PIPES.replace("{{ m.content }}<|end|>", "{{ m.content }}\n<|end|>"),
        [Case(TWO, [["Well<|end|>", "Fine<|end|>"]])],
        strip="l",
    ),
    "the end of turn swallows on both sides": Pattern(
        PIPES.replace("{{ m.content }}<|end|>", "{{ m.content }} <|end|>"),
        [Case(TWO, [["Well<|end|>", "Fine<|end|>"]])],
        strip="lr",
    ),
    "a finished chat has one more token": Pattern(
        PIPES.replace("<|assistant|>\n{% endif %}", "<|assistant|>\n{% else %}</s>{% endif %}"),
        [Case(TWO, [["Well<|end|>", "Fine<|end|>"]])],
    ),
    "the end of turn is the next turn's first token": Pattern(
        OPEN,
        [
            Case(TWO, [["Well<|user|>", "Fine"]]),
            Case(AFTER, [[f"<call>{written('Paris')}</call><|tool|>", "Sunny."]]),
            Case([user(), says(), says("Fine"), user(), says()], [["Well", "Fine<|user|>", "Well"]]),
        ],
    ),
    "the end of turn stands before the next turn": Pattern(
        "{% for m in messages %}{% if m.role == 'assistant' %}<|reply|>{{ m.content }}{% else %}"
        "{% if loop.index0 and messages[loop.index0 - 1].role == 'assistant' %}<|/reply|>{% endif %}"
        "<|user|>{{ m.content }}<|end|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|reply|>{% endif %}",
        [Case(TWO, [["Well<|/reply|>", "Fine"]])],
    ),
    "the last turn isn't closed": Pattern(
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}"
        "{{ '' if loop.last and m.role == 'assistant' else '\n<|end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
        [Case(TWO, [["Well\n<|end|>", "Fine"]]), Case([user(), says(), says("Fine")], [["Well", "Fine"]])],
    ),
    "only the last turn is closed": Pattern(
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
        "{{ '</s>' if loop.last and m.role == 'assistant' else '' }}"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}",
        [Case(TWO, [["Well</s>"], ["Fine</s>"]])],
    ),
    "content and turn have an end each": Pattern(
        "{% for m in messages %}<|start|>{{ m.role }}<|reply|>{{ m.content }}<|/reply|></s>{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant<|reply|>{% endif %}",
        [Case(TWO, [["Well<|/reply|></s>", "Fine<|/reply|></s>"]])],
    ),
    "the next header is always there": Pattern(
        "{% for m in messages %}<|start|>{{ m.role }}<|sep|>{{ m.content or '' }}" + CALLS + "<|end|>{% endfor %}"
        "<|start|>assistant<|sep|>",
        [
            Case(TWO, [["Well<|end|>", "Fine<|end|>"]]),
            Case(AFTER, [[f"<call>{written('Paris')}</call><|end|>", "Sunny.<|end|>"]]),
        ],
    ),
    "the next header comes after tool calls": Pattern(
        "{% for m in messages %}<|start|>{{ m.role }}<|sep|>{% if m.tool_calls %}"
        + CALLS
        + "<|end|><|start|>{% if loop.last %}tool<|sep|>{% endif %}"
        "{% else %}{{ m.content }}<|end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant<|sep|>{% endif %}",
        [Case(CALL, [[f"<call>{written('Paris')}</call><|end|>"]])],
    ),
    "instructions come after the last turn": Pattern(
        "{% for m in messages %}<|start|>{{ m.role }}<|sep|>{{ m.content }}<|end|>{% endfor %}"
        "<|start|>system<|sep|>Call a tool.<|end|>{% if add_generation_prompt %}<|start|>assistant<|sep|>{% endif %}",
        [Case(ONE, [["Well<|end|>"]]), Case(TWO, [["Well<|end|>"], ["Fine<|end|>"]])],
    ),
    "no prompt is given after a system message": Pattern(
        CHATML.replace(
            "{% if add_generation_prompt %}", "{% if add_generation_prompt and messages[-1].role == 'user' %}"
        ),
        [
            Case([SYSTEM, says(), user(), says("Fine")], [["Well" + END, "Fine" + END]]),
            Case([user(), says(), says("Fine")], [["Well" + END, "Fine" + END]]),
            Case([user(), RESULT, says("Fine")], [["Fine" + END]]),
        ],
    ),
    "the header depends on the answer, without a prompt": Pattern(
        "{% for m in messages %}<|{{ m.role }}|>{{ '<|reply|>' if m.role == 'assistant' else '' }}{{ m.content }}"
        "<|end|>{% endfor %}{% if add_generation_prompt and messages[-1].role != 'system' %}<|assistant|>{% endif %}",
        [Case(ONE, [["<|reply|>Well<|end|>"]]), Case([SYSTEM, says()], [["<|reply|>Well<|end|>"]])],
    ),
    "a turn goes on after a tool result": Pattern(
        "{% for m in messages %}{% if m.role == 'tool' %}<|tool|>{{ m.content }}<|sep|>{% else %}"
        "{% if not loop.index0 or messages[loop.index0 - 1].role != 'tool' %}<|{{ m.role }}|>\n{% endif %}"
        "{{ m.content or '' }}" + CALLS + "{{ '' if m.tool_calls else '<|end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt and messages[-1].role != 'tool' %}<|assistant|>\n{% endif %}",
        [Case(AFTER, [[f"<call>{written('Paris')}</call>", "Sunny.<|end|>"]])],
    ),
    "no prompt and no token between turns": Pattern(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}",
        [Case(TWO, [[" Well", " Fine"]])],
    ),
    "roles must alternate": Pattern(
        ALTERNATES,
        [
            Case(TWO, [[" Well</s>", " Fine</s>"]]),
            Case([*ONE, user(), user(), says()], [[" Well</s>"]], {4: "roles must alternate"}),
            Case([SYSTEM, *ONE], [], {2: "roles must alternate"}),
        ],
    ),
    "the system prompt moves to the last question": Pattern(
        MOVES, [Case([SYSTEM, *ONE], [[" Well</s>"]]), Case([SYSTEM, *TWO], [[" Well</s>"], [" Fine</s>"]])]
    ),
    "a tool call has its own end": Pattern(
        TOOL_CHATML.replace(END, "{{ '<|eom|>' if m.tool_calls else '<|im_end|>' }}"),
        [Case(AFTER, [[f"<call>{written('Paris')}</call><|eom|>", "Sunny." + END]])],
    ),
    "channels": Pattern(
        CHANNELS,
        [
            Case(ONE, [["<|channel|>final<|message|>Well<|return|>"]]),
            Case(
                THOUGHT,
                [
                    [
                        f"<|channel|>analysis<|message|>{a}<|end|><|start|>assistant<|channel|>final<|message|>{b}<|return|>"
                    ]
                    for a, b in (("Hm.", "Well"), ("So.", "Fine"))
                ],
            ),
            Case(
                [user(), says(None, "Hm.", "Paris"), RESULT, says("Sunny.")],
                [
                    [
                        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>call<|message|>"
                        f"{written('Paris')}<|call|>",
                        "<|channel|>final<|message|>Sunny.<|return|>",
                    ]
                ],
            ),
            Case([user(), says(None, None, "Paris", "Rome")], [], {1: "does not show all tool calls"}),
        ],
    ),
    "content that is null is not printed": Pattern(
        "{% for m in messages %}{% if m.tool_calls %}<|assistant|>" + CALLS + "<|end|>{% endif %}"
        "{% if m.content is not none %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}",
        [Case(AFTER, [[f"<call>{written('Paris')}</call><|end|>", "Sunny.<|end|>"]])],
    ),
    "content that is null stops the template": Pattern(
        TOOL_CHATML.replace("m.content or ''", "'' + m.content"),
        [Case(AFTER, [[f"<call>{written('Paris')}</call>{END}", "Sunny." + END]])],
    ),
    "content that is null is printed as None": Pattern(
        TOOL_CHATML.replace("m.content or ''", "m.content"),
        [Case(AFTER, [[f"<call>{written('Paris')}</call>{END}", "Sunny." + END]])],
    ),
    "an answer needs content or calls": Pattern(
        TOOL_CHATML.replace(
            "{{ m.content or",
            "{% if not m.content and not m.tool_calls %}{{ raise_exception('nothing') }}{% endif %}{{ m.content or",
        ),
        [Case(AFTER, [[f"<call>{written('Paris')}</call>{END}", "Sunny." + END]])],
    ),
    "arguments are wanted as text": Pattern(
        TOOL_CHATML.replace("{{ c.function | tojson }}", "{{ c.function.name + ' ' + c.function.arguments }}"),
        [Case(AFTER, [['<call>weather {"city": "Paris"}</call>' + END, "Sunny." + END]])],
    ),
    "arguments are wanted as an object": Pattern(
        TOOL_CHATML.replace(
            "{{ c.function | tojson }}",
            "{{ c.function.name }}{% for k, v in c.function.arguments.items() %} {{ k }}={{ v }}{% endfor %}",
        ),
        [Case(CALL, [["<call>weather city=Paris</call>" + END]])],
    ),
    "arguments are not shown": Pattern(
        TOOL_CHATML.replace("{{ c.function | tojson }}", "{{ c.function.name }}"),
        [Case(AFTER, [["Sunny." + END]], {1: "all arguments"})],
    ),
    "tool calls are not shown": Pattern(CHATML, [Case(AFTER, [["Sunny." + END]], {1: "does not show tool calls"})]),
    "text beside a tool call is not shown": Pattern(
        TOOL_CHATML.replace("{{ m.content or '' }}", "{{ '' if m.tool_calls else m.content }}"),
        [
            Case(CALL, [[f"<call>{written('Paris')}</call>{END}"]]),
            Case([user(), says("Look:", None, "Paris"), *ONE], [["Well" + END]], {1: "text beside a tool call"}),
        ],
    ),
    "a thought in the text is taken out": Pattern(
        CUTS,
        [
            Case(TWO, [["Well" + END, "Fine" + END]]),
            Case([user(), says(" <think>Hm.</think>Well\n"), *ONE], [["<think>Hm.</think>Well" + END], ["Well" + END]]),
            Case([user(), says("So <think>Hm.</think>Well")], [], {1: "takes the reasoning out"}),
            Case([user(), says("<think>Hm.</think>Well\ud83d")], [], {1: "half a surrogate pair"}),
            Case([user(), says("<think>Hm.</think>Well", None, "Paris")], [], {1: "takes the reasoning out"}),
        ],
    ),
    "a thought in the text is taken out and the prompt opens it": Pattern(
        CUTS + "{% if add_generation_prompt %}<think>\n{% endif %}",
        [
            Case(IN_TEXT, [["Hm.\n</think>Well" + END], ["So.</think>Fine" + END]]),
            Case([user(), says("\nHm.</think>Well\n")], [["Hm.</think>Well" + END]]),
            Case([user(), says("So <think>Hm.</think>Well")], [], {1: "takes the reasoning out"}),
        ],
    ),
    "a thought in the text is taken out and the prompt closes it": Pattern(
        CUTS + "{% if add_generation_prompt %}</think>{% endif %}",
        [Case(IN_TEXT, [], {1: "takes the reasoning out", 3: "takes the reasoning out"})],
    ),
    "a thought in the text is taken out later": Pattern(
        CHATML.replace("{{ m.content }}", "{{ m.content if loop.last else m.content.split('</think>')[-1] }}"),
        [
            Case(
                [user(), says("<think>Hm.</think>Well"), user(), says("<think>So.</think>Fine")],
                [["<think>Hm.</think>Well" + END], ["<think>So.</think>Fine" + END]],
            )
        ],
    ),
    "an empty thought until the next turn": Pattern(
        CHATML.replace(
            "{{ m.content }}", "{% if loop.last and m.role == 'assistant' %}<think></think>{% endif %}{{ m.content }}"
        ),
        [
            Case(TWO, [["<think></think>Well" + END], ["<think></think>Fine" + END]]),
            Case([user(), says(), says("Fine")], [["<think></think>Well" + END, "<think></think>Fine" + END]]),
        ],
    ),
    "a thought in text between the turns of a tool": Pattern(
        THINKING.replace("{% if m.reasoning_content %}", "{% if m.reasoning_content and loop.last %}"),
        [
            Case(
                [user(), says(None, "Hm.", "Paris"), RESULT, says("Sunny.", "So.")],
                [[f"<think>Hm.</think><call>{written('Paris')}</call>{END}"], ["<think>So.</think>Sunny." + END]],
            )
        ],
    ),
    "a thought is a part of the content": Pattern(
        "{% for m in messages %}<|{{ m.role }}|>{% if m.content is string %}{{ m.content }}{% else %}"
        "{% for p in m.content %}{{ '<think>' + p.thinking + '</think>' if p.type == 'thinking' else p.text }}"
        "{% endfor %}{% endif %}" + CALLS + "<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}",
        [
            Case(THOUGHT, [["<think>Hm.</think>Well<|end|>", "<think>So.</think>Fine<|end|>"]]),
            Case(
                [user(), says([{"type": "thinking", "thinking": "Hm."}, {"type": "text", "text": "Well"}])],
                [["<think>Hm.</think>Well<|end|>"]],
            ),
            Case(
                [user(), says(None, "Hm.", "Paris"), RESULT, says("Sunny.")],
                [[f"<think>Hm.</think><call>{written('Paris')}</call><|end|>", "Sunny.<|end|>"]],
            ),
        ],
    ),
    "a special token shares its first letter with the prompt": Pattern(
        "{% for m in messages %}<|{{ m.role }}|>"
        "{% if m.tool_calls %}<CALLS>{{ m.tool_calls[0].function | tojson }}</CALLS>"
        "{% elif m.role == 'assistant' %}<o></o>{{ m.content }}{% else %}{{ m.content }}{% endif %}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|><o>{% endif %}",
        [Case(CALL, [[f"<CALLS>{written('Paris')}</CALLS><|end|>"]])],
    ),
    "content is wanted in parts": Pattern(
        CHATML.replace(
            "{{ m.content }}", "{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}"
        ),
        [
            Case([SYSTEM, *TWO], [["Well" + END, "Fine" + END]]),
            Case([user([{"type": "text", "text": "Hi"}]), says()], [["Well" + END]]),
        ],
    ),
    "only a question is wanted in parts": Pattern(
        CHATML.replace("{{ m.content }}", "{{ m.content[0].text if m.role == 'user' else m.content }}"),
        [Case([SYSTEM, *TWO], [["Well" + END, "Fine" + END]])],
    ),
    "parts or text": Pattern(
        CHATML.replace(
            "{{ m.content }}", "{% if m.content is string %}{{ m.content }}{% else %}{{ m.content[0].text }}{% endif %}"
        ),
        [Case([user([{"type": "text", "text": "Hi"}]), says()], [["Well" + END]])],
    ),
    "a developer message is not shown": Pattern(
        CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'developer' %}"),
        [
            Case([DEVELOPER, *TWO], [], {2: "role developer", 4: "role developer"}),
            Case([*ONE, DEVELOPER, *ONE], [["Well" + END]], {4: "role developer"}),
        ],
    ),
    "a system message in mid-chat is not shown": Pattern(
        CHATML.replace(
            "{% for m in messages %}", "{% for m in messages %}{% if m.role != 'system' or loop.first %}"
        ).replace("{% endfor %}", "{% endif %}{% endfor %}"),
        [Case([SYSTEM, *ONE], [["Well" + END]]), Case([*ONE, SYSTEM, *ONE], [["Well" + END]], {4: "role system"})],
    ),
    "a tool result is not shown": Pattern(
        TOOL_CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'tool' %}"),
        [Case(AFTER, [[f"<call>{written('Paris')}</call>{END}"]], {3: "role tool"})],
    ),
    "a tool result ends otherwise when it is last": Pattern(
        TOOL_CHATML.replace("<|im_end|>\n", "{{ '' if m.role == 'tool' and loop.last else '\n' }}<|im_end|>\n"),
        [Case(AFTER, [[f"<call>{written('Paris')}</call>\n{END}", "Sunny.\n" + END]])],
    ),
    "marks that agree": Pattern(MARKED, [Case(TWO, [["Well" + END, "Fine" + END]])]),
    "marks without the end of turn": Pattern(
        MARKED.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>"),
        [Case(TWO, [["Well", "Fine"]])],
    ),
    "marks with header and line break": Pattern(
        CHATML.replace(
            "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n",
            "{% if m.role == 'assistant' %}{% generation %}<|im_start|>assistant\n{{ m.content }}<|im_end|>\n"
            "{% endgeneration %}{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}",
        ),
        [Case(TWO, [["Well" + END, "Fine" + END]])],
    ),
    "marks that leave out an answer after a tool": Pattern(
        MARKED.replace(
            "m.role == 'assistant' %}", "m.role == 'assistant' and messages[loop.index0 - 1].role != 'tool' %}"
        ),
        [Case([user(), says(), RESULT, says("Sunny.")], [["Well" + END]], {3: "marks leave it out"})],
    ),
    "content is trimmed": Pattern(
        CHATML.replace("{{ m.content }}", "{{ m.content | trim }}"),
        [
            Case([user(), says(" Well \n")], [["Well" + END]]),
            Case(THOUGHT, [], {1: "does not show reasoning", 3: "does not show reasoning"}),
        ],
    ),
    "content is JSON": Pattern(
        CHATML.replace("{{ m.content }}", "{{ m.content | tojson }}"),
        [
            Case([user(), says('"Well"\n')], [['"\\"Well\\"\\n"' + END]]),
            Case(THOUGHT, [], {1: "does not show reasoning", 3: "does not show reasoning"}),
        ],
    ),
    "the length of the chat is in the text": Pattern(
        "{{ messages | length }}" + CHATML, [Case(ONE, [], {1: "changes the conversation"})]
    ),
    "the name of the recipient begins an answer": Pattern(
        "{% for m in messages %}<|{{ m.role }}|>"
        "{% if m.tool_calls %}{% for c in m.tool_calls %}>>>{{ c.function.name }}\n"
        "{{ c.function.arguments }}{% endfor %}{% elif m.role == 'assistant' %}>>>all\n{{ m.content }}{% else %}"
        "{{ m.content }}{% endif %}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>>>>{% endif %}",
        [Case(ONE, [["all\nWell<|end|>"]]), Case(CALL, [["weather\n{'city': 'Paris'}<|end|>"]])],
    ),
    "nothing of a template is special": Pattern(
        "{% for m in messages %}\n{{ '### ' + m.role }}:\n{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}\n### assistant:\n{% endif %}",
        [Case([user(), says("Well.")], [["Well."]])],
    ),
}
"""Every pattern with its chats, and what is trained on of them."""
