# The kser command on a slim Python, as a user without rights. Build: docker build -t kser .
FROM python:3.12-slim
RUN useradd --create-home --uid 10001 kser
WORKDIR /app
COPY pyproject.toml README.md ./
COPY kser ./kser
RUN pip install --no-cache-dir . && rm -rf /root/.cache
USER kser
# Where tasks look for the pause, terminate and running files.
ENV LOCK_PATH=/tmp/kser PYTHONUNBUFFERED=1
ENTRYPOINT ["kser"]
CMD ["--help"]
