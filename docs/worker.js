/* The search runs in a Worker, whose script browsers do not load from file://. Run it in a frame. */
if (location.protocol === "file:")
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      frame.answer = data => this.dispatchEvent(new MessageEvent("message", { data }))
      frame.srcdoc = `<script>self.postMessage = data => frameElement.answer(data)</script>
        <script src="${url}"></script>`
      this.loaded = new Promise(resolve => {
        frame.onload = () => resolve(frame.contentWindow)
      })
      document.body.append(frame)
    }

    postMessage(data) {
      this.loaded.then(frame => frame.dispatchEvent(new MessageEvent("message", { data })))
    }
  }
