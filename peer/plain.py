"""Messages made plain, for JSON."""

from typing import Any

from google.protobuf.message import Message


def plain(message: Message) -> dict[str, Any]:
    """Every field by name, absent optional and message fields as None; protobuf's own JSON quotes large numbers."""
    return {field.name: _value(message, field) for field in message.DESCRIPTOR.fields}


def _value(message: Message, field: Any) -> Any:
    value = getattr(message, field.name)
    if field.message_type and field.message_type.GetOptions().map_entry:
        return dict(value)
    if field.is_repeated:
        return [plain(item) for item in value] if field.message_type else list(value)
    if field.has_presence and not message.HasField(field.name):
        return None
    return plain(value) if field.message_type else value
