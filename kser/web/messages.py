"""Messages: what a producer over HTTP posts."""

from typing import Any

import flask

from kser.http.endpoint import answer, handing_to
from kser.http.wire import MESSAGES_PATH, MessagesSchema, OutcomesSchema, posted
from kser.web.blueprint import ApiBlueprint
from kser.web.site import site

__all__ = ["messages"]

messages = ApiBlueprint("messages", __name__, description="Messages, to be sent to Kafka")


@messages.route(MESSAGES_PATH, methods=["POST"])
@messages.arguments(MessagesSchema)
@messages.response(200, OutcomesSchema)
def send_messages(body: dict[str, Any]) -> flask.Response:
    """Send messages, in their order, and wait until the broker has confirmed all of them.

    When one was not confirmed the answer is the problem of the first; ``results`` tells of each.
    """
    here = site()
    return answer(handing_to(here.producer, here.settings.timeout_s)(posted(body)))
