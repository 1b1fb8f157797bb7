// Browsers start no worker from a file, so that the search would fail in pages that are opened from the disk.
// There, a hidden frame runs the worker's script in its place.
class FrameWorker extends EventTarget {
  constructor(url) {
    super();

    // importScripts of a worker returns when all scripts have run. Here it returns a promise, for which the search waits.
    const setUp = `
      const postMessage = data => parent.postMessage(data, "*");
      const importScripts = async (...urls) => {
        for (const url of urls)
          await new Promise(done => document.body.append(Object.assign(document.createElement("script"), {src: url, onload: done})));
      };`;
    this.frame = document.createElement("iframe");
    this.frame.hidden = true;
    document.body.append(this.frame);
    this.ready = new Promise(done => this.frame.onload = done);

    const content = this.frame.contentDocument;
    content.open();
    content.write(`<body><script>${setUp}</script><script src="${url}"></script></body>`);
    content.close();
    addEventListener("message", event => {
      if (event.source === this.frame.contentWindow) this.dispatchEvent(new MessageEvent("message", {data: event.data}));
    });
  }

  async postMessage(data) {
    await this.ready;
    const content = this.frame.contentWindow;
    content.dispatchEvent(new content.MessageEvent("message", {data}));
  }
}

if (location.protocol === "file:") window.Worker = FrameWorker;
