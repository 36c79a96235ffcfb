"""FastAPI on uvicorn: two processes, one for each core, as uvicorn's documentation on deployment advises.

uvloop and httptools come with `uvicorn[standard]`; the access log is off. The body is read as bytes and the answer is a
bare Response, so that nothing is validated or serialised twice. Each picture is computed in the event loop: a thread
pool costs more than 0.1 ms of work. With PEER_BATCH there is a queue: the loop takes all that has arrived by its next
turn, at most so many, so a lone request waits for nobody.
"""

import asyncio
import os
from contextlib import asynccontextmanager

import model
import uvicorn
from fastapi import FastAPI, Request, Response

BATCH = int(os.environ.get("PEER_BATCH", "1"))
net: model.Model
waiting: "asyncio.Queue[tuple[bytes, asyncio.Future[bytes]]]"


@asynccontextmanager
async def lifespan(app: FastAPI):
    global net, waiting
    net = model.Model()
    waiting = asyncio.Queue()
    task = asyncio.create_task(compute())
    yield
    task.cancel()


app = FastAPI(lifespan=lifespan, openapi_url=None)


@app.post("/predict")
async def predict(request: Request) -> Response:
    encoded = await request.body()
    if BATCH == 1:
        return Response(net.bodies([encoded])[0], media_type="application/json")
    answered = asyncio.get_running_loop().create_future()
    waiting.put_nowait((encoded, answered))
    return Response(await answered, media_type="application/json")


async def compute() -> None:
    while True:
        batch = [await waiting.get()]
        await asyncio.sleep(0)  # what the loop has already read gets its turn to come in
        while len(batch) < BATCH and not waiting.empty():
            batch.append(waiting.get_nowait())
        try:
            bodies = net.bodies([encoded for encoded, _ in batch])
        except Exception as error:
            for _, answered in batch:
                answered.set_exception(error)
            continue
        for (_, answered), body in zip(batch, bodies, strict=True):
            if not answered.done():
                answered.set_result(body)


if __name__ == "__main__":
    uvicorn.run("server:app", host="127.0.0.1", port=model.PORT, workers=2, access_log=False, log_level="warning")
