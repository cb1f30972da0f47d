"""Chat templates in the shapes that real models have, and some that change what users wrote."""

from __future__ import annotations

CHATML = """{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""

LLAMA3 = """{{- bos_token }}
{%- if messages[0].role == 'system' %}
  {%- set system = messages[0]['content'] | trim %}{%- set messages = messages[1:] %}
{%- else %}{%- set system = '' %}{%- endif %}
{%- macro head(role) %}{{ '<|start_header_id|>' + role + '<|end_header_id|>\n\n' }}{% endmacro %}
{{- head('system') ~ system ~ '<|eot_id|>' }}
{%- for message in messages %}
{{- head(message['role']) + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- head('assistant') }}{%- endif %}"""

GEMMA = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif -%}
{% for message in messages -%}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
{{ raise_exception('Roles must alternate') }}{% endif -%}
{%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor -%}
{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""

MISTRAL = """{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' -%}
{{ '[INST] ' + message['content'] + ' [/INST]' }}
{%- else %}{{ ' ' + message['content'] + eos_token }}{% endif %}
{%- endfor %}"""

# The shape of GLM's: roles as control tokens, reasoning cut out of earlier answers, tools as JSON lines.
GLM = """[gMASK]<sop>
{%- if tools %}<|system|>\n# Tools\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}{% endif %}
{%- macro visible(text) -%}
{{ text.split('</think>')[-1].lstrip('\n') if '</think>' in text else text }}{% endmacro %}
{%- for m in messages %}
{%- if m.role == 'user' %}<|user|>\n{{ m.content }}
{%- elif m.role == 'assistant' %}<|assistant|>\n{{ visible(m.content).strip() }}
{%- for call in m.tool_calls or [] %}
{{- '\n<tool_call>' ~ call.function.name }}\n{% for k, v in call.function.arguments.items() -%}
<arg_key>{{ k }}</arg_key>\n<arg_value>{{ v | tojson if v is not string else v }}</arg_value>\n
{%- endfor %}</tool_call>
{%- endfor %}
{%- elif m.role == 'tool' %}<|observation|>\n<tool_response>\n{{ m.content }}\n</tool_response>
{%- else %}<|system|>\n{{ m.content }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|assistant|>
{{- '\n<think></think>' if enable_thinking is false else '' }}{% endif %}"""


def _changing(expression: str) -> str:
    return "{% for m in messages %}<|im_start|>" + expression + "<|im_end|>{% endfor %}"


REAL = {"chatml": CHATML, "llama3": LLAMA3, "gemma": GEMMA, "mistral": MISTRAL, "glm": GLM}
# A control token could come into being only in the rendering.
CHANGING = {
    "lower": _changing("{{ m.content | lower }}"),
    "remove": _changing("{{ m.content.replace('~', '') }}"),
    "join": _changing("{{ m.name ~ m.content }}"),
    "half": _changing("{{ m.content }}nd|>"),
    "first": _changing("{{ '<' ~ m.content }}"),
    "reverse": _changing("{{ m.content[::-1] }}"),
    "ascii": _changing("{{ m.content | tojson(ensure_ascii=true) }}"),
    "repr": _changing("{{ [m.content] }}"),
    "characters": _changing("{% for c in m.content %}{{ c }}{% endfor %}"),
}
TEMPLATES = REAL | CHANGING
