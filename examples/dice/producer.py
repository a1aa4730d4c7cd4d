import logging
logging.basicConfig(
    level=logging.INFO, format="%(asctime)s %(levelname)-8s %(message)s"
)

import os
import uuid
from kser.python_kafka.producer import Producer
from kser.schemas import Message

pro = Producer({"bootstrap_servers": os.environ.get("KSER_BOOTSTRAP_SERVERS", "127.0.0.1:9092")})
pro.send(os.environ.get("KSER_TOPIC", "dice"), Message(uuid=str(uuid.uuid4()), entrypoint="__main__.DiceRoll"))
