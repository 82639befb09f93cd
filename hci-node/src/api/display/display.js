// A VM's screen in a browser: a client of RFB 3.8 (RFC 6143) over a WebSocket, whose binary messages are the stream of bytes, cut anywhere.
//
// The URL's fragment says which VM and has the ticket that opens the WebSocket, once. Keys are sent by their place on the keyboard (QEMU's extended key
// events), so that the guest's layout is the one that counts. Nothing that the server sends is taken for more than pixels and text.

// ---- What the server and we say to each other -------------------------------------------------------------------------------------------------------

const PROTOCOL = "hci-display";
const SECURITY_NONE = 1;
const ENCODING = { raw: 0, zrle: 16, extendedDesktopSize: -308, desktopSize: -223, extendedKeys: -258 };
const FROM_SERVER = { update: 0, colourMap: 1, bell: 2, text: 3 };
// 32 bits a pixel, true colour, little endian: blue, green, red and one unused byte.
const PIXEL_FORMAT = [32, 24, 0, 1, 0, 255, 0, 255, 0, 255, 16, 8, 0, 0, 0, 0];
const PIXEL = 4;
const COMPACT_PIXEL = 3;
const TILE = 64;
const LONGEST_SIDE = 16384;
const LONGEST_PIECE = 64 << 20;
// A zlib stream of one stored byte and a flush. What comes out at once shows whether the browser's decompressor holds data back.
const FLUSH_PROBE = [0x78, 0x01, 0x00, 0x01, 0x00, 0xfe, 0xff, 0x41, 0x00, 0x00, 0x00, 0xff, 0xff];
const FLUSH_PATIENCE = 500;

/** The conversation cannot go on; its message is for the user. */
class Ended extends Error {}

/** Bytes that come in pieces and are taken in others. */
class Bytes {
    #pieces = [];
    #length = 0;
    #end = null;
    #wake = null;

    push(piece) {
        if (piece.length > 0) {
            this.#pieces.push(piece);
            this.#length += piece.length;
            this.#wake?.();
        }
    }

    /** Nothing follows; who waits, or will, is told why. */
    end(error) {
        this.#end ??= error;
        this.#wake?.();
    }

    get length() {
        return this.#length;
    }

    /** All that is there, in one piece, without taking it. */
    peek() {
        if (this.#pieces.length > 1) {
            const whole = new Uint8Array(this.#length);
            let at = 0;
            for (const piece of this.#pieces) {
                whole.set(piece, at);
                at += piece.length;
            }
            this.#pieces = [whole];
        }
        return this.#pieces[0] ?? new Uint8Array();
    }

    drop(length) {
        const rest = this.peek().subarray(length);
        this.#pieces = rest.length > 0 ? [rest] : [];
        this.#length = rest.length;
    }

    /** Until there are more bytes than so many. */
    async more(than) {
        while (this.#length <= than) {
            if (this.#end) throw this.#end;
            await new Promise((resolve) => { this.#wake = resolve; });
            this.#wake = null;
        }
    }

    /** The next bytes, as soon as there are so many. */
    async take(length) {
        if (length > LONGEST_PIECE) throw new Ended("The VM's display sent something too large.");
        while (this.#length < length) await this.more(this.#length);
        const taken = this.peek().subarray(0, length);
        this.drop(length);
        return taken;
    }

    async view(length) {
        const taken = await this.take(length);
        return new DataView(taken.buffer, taken.byteOffset, length);
    }
}

// ---- ZRLE -------------------------------------------------------------------------------------------------------------------------------------------

/** Too little data for a whole tile yet. */
const SHORT = -1;

/** The one zlib stream that lasts as long as the connection. */
class Inflater {
    #writer;
    output = new Bytes();

    constructor() {
        const stream = new DecompressionStream("deflate");
        this.#writer = stream.writable.getWriter();
        this.#read(stream.readable.getReader());
    }

    async #read(reader) {
        try {
            for (;;) {
                const { value, done } = await reader.read();
                if (done) break;
                this.output.push(value);
            }
        } catch { /* Said below. */ }
        this.output.end(new Ended("The VM's display sent something that cannot be decompressed."));
    }

    write(piece) {
        // What is wrong with it, the reader is told.
        this.#writer.write(piece.slice()).catch(() => {});
    }

    /** Whether what was flushed by the sender comes out, without more being put in. */
    static async works() {
        if (typeof DecompressionStream === "undefined") return false;
        const probe = new Inflater();
        probe.write(Uint8Array.from(FLUSH_PROBE));
        const late = new Promise((resolve) => setTimeout(() => resolve(false), FLUSH_PATIENCE));
        return Promise.race([probe.output.take(1).then((byte) => byte[0] === 0x41, () => false), late]);
    }
}

/** Reads a tile from the front of `data` into `pixels` (a Uint32Array of `width` * `height`). Returns how long it was, or SHORT. */
export function readTile(data, pixels, width, height) {
    const total = width * height;
    let at = 1;
    const has = (length) => at + length <= data.length;
    // Blue, green, red; in the canvas's words red is lowest, and the top byte says that nothing shines through.
    const pixel = () => {
        const value = 0xff000000 | (data[at] << 16) | (data[at + 1] << 8) | data[at + 2];
        at += COMPACT_PIXEL;
        return value;
    };
    if (data.length < 1) return SHORT;
    const kind = data[0];
    const runs = kind >= 128;
    const colours = runs ? kind - 128 : kind;
    if (kind === 0) {
        if (!has(total * COMPACT_PIXEL)) return SHORT;
        for (let i = 0; i < total; i++) pixels[i] = pixel();
        return at;
    }
    if ((kind > 16 && kind < 128) || kind === 129) throw new Ended("The VM's display sent a tile that makes no sense.");
    if (!has(colours * COMPACT_PIXEL)) return SHORT;
    const palette = Array.from({ length: colours }, pixel);
    if (kind === 1) {
        pixels.fill(palette[0], 0, total);
        return at;
    }
    if (!runs) {
        const bits = colours === 2 ? 1 : colours <= 4 ? 2 : 4;
        const row = Math.ceil((width * bits) / 8);
        if (!has(row * height)) return SHORT;
        for (let y = 0; y < height; y++, at += row) {
            for (let x = 0; x < width; x++) {
                const shift = 8 - bits - ((x * bits) & 7);
                pixels[y * width + x] = palette[(data[at + ((x * bits) >> 3)] >> shift) & ((1 << bits) - 1)] ?? 0xff000000;
            }
        }
        return at;
    }
    for (let i = 0; i < total;) {
        let value;
        let length = 1;
        let repeated = true;
        if (colours === 0) {
            if (!has(COMPACT_PIXEL + 1)) return SHORT;
            value = pixel();
        } else {
            if (!has(1)) return SHORT;
            const index = data[at++];
            value = palette[index & 127] ?? 0xff000000;
            repeated = index >= 128;
        }
        while (repeated) {
            if (!has(1)) return SHORT;
            const add = data[at++];
            length += add;
            repeated = add === 255;
        }
        if (i + length > total) throw new Ended("The VM's display sent a tile that makes no sense.");
        pixels.fill(value, i, i + length);
        i += length;
    }
    return at;
}

// ---- Keys -------------------------------------------------------------------------------------------------------------------------------------------

// Keys by their place (KeyboardEvent.code): scan codes of set 1; bit 7 stands for the prefix e0. Rows are consecutive codes.
const SCAN_CODES = new Map();
const row = (first, codes) => codes.split(" ").forEach((code, at) => SCAN_CODES.set(code, first + at));
row(0x01, "Escape Digit1 Digit2 Digit3 Digit4 Digit5 Digit6 Digit7 Digit8 Digit9 Digit0 Minus Equal Backspace Tab");
row(0x10, "KeyQ KeyW KeyE KeyR KeyT KeyY KeyU KeyI KeyO KeyP BracketLeft BracketRight Enter ControlLeft");
row(0x1e, "KeyA KeyS KeyD KeyF KeyG KeyH KeyJ KeyK KeyL Semicolon Quote Backquote ShiftLeft Backslash");
row(0x2c, "KeyZ KeyX KeyC KeyV KeyB KeyN KeyM Comma Period Slash ShiftRight NumpadMultiply AltLeft Space CapsLock");
row(0x3b, "F1 F2 F3 F4 F5 F6 F7 F8 F9 F10 NumLock ScrollLock Numpad7 Numpad8 Numpad9 NumpadSubtract Numpad4 Numpad5 Numpad6");
row(0x4e, "NumpadAdd Numpad1 Numpad2 Numpad3 Numpad0 NumpadDecimal");
row(0x56, "IntlBackslash F11 F12 NumpadEqual");
row(0x64, "F13 F14 F15 F16 F17 F18 F19 F20 F21 F22 F23");
for (const [code, scan] of Object.entries({
    KanaMode: 0x70, IntlRo: 0x73, F24: 0x76, Convert: 0x79, NonConvert: 0x7b, IntlYen: 0x7d, NumpadComma: 0x7e,
    NumpadEnter: 0x9c, ControlRight: 0x9d, NumpadDivide: 0xb5, PrintScreen: 0xb7, AltRight: 0xb8, Pause: 0xc6, Home: 0xc7, ArrowUp: 0xc8,
    PageUp: 0xc9, ArrowLeft: 0xcb, ArrowRight: 0xcd, End: 0xcf, ArrowDown: 0xd0, PageDown: 0xd1, Insert: 0xd2, Delete: 0xd3,
    MetaLeft: 0xdb, MetaRight: 0xdc, ContextMenu: 0xdd,
})) SCAN_CODES.set(code, scan);

// Symbols of X11 for keys that are no characters (KeyboardEvent.key): by name, and for left and right.
const SYMBOLS = {
    Backspace: 0xff08, Tab: 0xff09, Enter: 0xff0d, Pause: 0xff13, ScrollLock: 0xff14, Escape: 0xff1b, Home: 0xff50, ArrowLeft: 0xff51,
    ArrowUp: 0xff52, ArrowRight: 0xff53, ArrowDown: 0xff54, PageUp: 0xff55, PageDown: 0xff56, End: 0xff57, PrintScreen: 0xff61, Insert: 0xff63,
    ContextMenu: 0xff67, NumLock: 0xff7f, CapsLock: 0xffe5, AltGraph: 0xfe03, Delete: 0xffff,
};
const SIDED_SYMBOLS = { Shift: 0xffe1, Control: 0xffe3, Alt: 0xffe9, Meta: 0xffeb };
const UNICODE_SYMBOLS = 0x01000000;

/** The symbol of a key event; 0 if there is none. */
export function symbolOf({ key, code }) {
    if (key in SIDED_SYMBOLS) return SIDED_SYMBOLS[key] + (code.endsWith("Right") ? 1 : 0);
    if (key in SYMBOLS) return SYMBOLS[key];
    const f = /^F(\d+)$/.exec(key);
    if (f) return 0xffbd + Number(f[1]);
    const [first, second] = key;
    if (first === undefined || second !== undefined) return 0;
    const point = key.codePointAt(0);
    return point < 0x100 ? point : UNICODE_SYMBOLS + point;
}

// ---- The connection ---------------------------------------------------------------------------------------------------------------------------------

/** A client of a VM's display. `shown` is called when the first update has come. */
class Display {
    #socket;
    #input = new Bytes();
    #inflater = null;
    #canvas;
    #context;
    #extendedKeys = false;
    #shown;
    #width = 0;
    #height = 0;

    constructor(socket, canvas, shown) {
        this.#socket = socket;
        this.#canvas = canvas;
        this.#context = canvas.getContext("2d", { alpha: false });
        this.#shown = shown;
        socket.binaryType = "arraybuffer";
        let opened = false;
        socket.onopen = () => { opened = true; };
        socket.onmessage = ({ data }) => {
            if (data instanceof ArrayBuffer) this.#input.push(new Uint8Array(data));
        };
        socket.onclose = ({ code, reason }) => {
            let why = "The connection to the node was lost.";
            if (!opened) why = "The node did not let this page in: the link was used already, or is older than a minute.";
            else if (code >= 4000) why = `There is no screen: ${reason}.`;
            else if (reason) why = `The connection has ended: ${reason}.`;
            this.#input.end(new Ended(why));
        };
    }

    get size() {
        return { width: this.#width, height: this.#height };
    }

    /** Shows the screen until the conversation ends; throws why. */
    async run() {
        await this.#greet();
        const compressed = await Inflater.works();
        if (compressed) this.#inflater = new Inflater();
        this.#send([0, 0, 0, 0, ...PIXEL_FORMAT]);
        const encodings = [
            ...(compressed ? [ENCODING.zrle] : []), ENCODING.raw,
            ENCODING.extendedDesktopSize, ENCODING.desktopSize, ENCODING.extendedKeys,
        ];
        const message = new DataView(new ArrayBuffer(4 + 4 * encodings.length));
        message.setUint8(0, 2);
        message.setUint16(2, encodings.length);
        encodings.forEach((encoding, at) => message.setInt32(4 + 4 * at, encoding));
        this.#send(message);
        this.#request(false);
        for (;;) await this.#hear();
    }

    async #greet() {
        const version = new TextDecoder().decode(await this.#input.take(12));
        if (!version.startsWith("RFB 003.")) throw new Ended("The VM's display does not speak RFB.");
        this.#send(new TextEncoder().encode("RFB 003.008\n"));
        const [count] = await this.#input.take(1);
        const offered = await this.#input.take(count);
        if (!offered.includes(SECURITY_NONE)) throw new Ended("The VM's display asks for a password.");
        this.#send([SECURITY_NONE]);
        if ((await this.#input.view(4)).getUint32(0) !== 0) throw new Ended("The VM's display has refused.");
        // Others who look may stay.
        this.#send([1]);
        const init = await this.#input.view(24);
        this.#resize(init.getUint16(0), init.getUint16(2));
        await this.#input.take(init.getUint32(20));
    }

    async #hear() {
        const [kind] = await this.#input.take(1);
        switch (kind) {
            case FROM_SERVER.update: return this.#update();
            case FROM_SERVER.bell: return;
            case FROM_SERVER.colourMap: {
                const head = await this.#input.view(5);
                await this.#input.take(6 * head.getUint16(3));
                return;
            }
            case FROM_SERVER.text: {
                const head = await this.#input.view(7);
                await this.#input.take(head.getUint32(3));
                return;
            }
            default: throw new Ended("The VM's display said something unknown.");
        }
    }

    async #update() {
        const head = await this.#input.view(3);
        let resized = false;
        for (let left = head.getUint16(1); left > 0; left--) {
            const place = await this.#input.view(12);
            const [x, y, width, height] = [0, 2, 4, 6].map((at) => place.getUint16(at));
            switch (place.getInt32(8)) {
                case ENCODING.raw: await this.#raw(x, y, width, height); break;
                case ENCODING.zrle: await this.#zrle(x, y, width, height); break;
                case ENCODING.desktopSize: resized = this.#resize(width, height) || resized; break;
                case ENCODING.extendedDesktopSize: {
                    const [screens] = await this.#input.take(4);
                    await this.#input.take(16 * screens);
                    // The vertical position is what became of a wish of ours; we have none.
                    resized = this.#resize(width, height) || resized;
                    break;
                }
                case ENCODING.extendedKeys: this.#extendedKeys = true; break;
                default: throw new Ended("The VM's display sent a picture that was not agreed on.");
            }
        }
        this.#request(!resized);
        this.#shown();
    }

    #resize(width, height) {
        if (width === this.#width && height === this.#height) return false;
        if (width < 1 || height < 1 || width > LONGEST_SIDE || height > LONGEST_SIDE) throw new Ended("The VM's screen has a size that cannot be shown.");
        [this.#width, this.#height] = [width, height];
        [this.#canvas.width, this.#canvas.height] = [width, height];
        return true;
    }

    async #raw(x, y, width, height) {
        const data = await this.#input.take(width * height * PIXEL);
        if (data.length === 0) return;
        const image = this.#context.createImageData(width, height);
        const pixels = image.data;
        for (let at = 0; at < data.length; at += PIXEL) {
            pixels[at] = data[at + 2];
            pixels[at + 1] = data[at + 1];
            pixels[at + 2] = data[at];
            pixels[at + 3] = 255;
        }
        this.#context.putImageData(image, x, y);
    }

    async #zrle(x, y, width, height) {
        const length = (await this.#input.view(4)).getUint32(0);
        const compressed = await this.#input.take(length);
        if (!this.#inflater) throw new Ended("The VM's display sent a picture that was not agreed on.");
        this.#inflater.write(compressed);
        const output = this.#inflater.output;
        for (let top = 0; top < height; top += TILE) {
            for (let left = 0; left < width; left += TILE) {
                const image = this.#context.createImageData(Math.min(TILE, width - left), Math.min(TILE, height - top));
                const pixels = new Uint32Array(image.data.buffer);
                for (;;) {
                    const read = readTile(output.peek(), pixels, image.width, image.height);
                    if (read !== SHORT) {
                        output.drop(read);
                        break;
                    }
                    await output.more(output.length);
                }
                this.#context.putImageData(image, x + left, y + top);
            }
        }
    }

    #request(incremental) {
        const message = new DataView(new ArrayBuffer(10));
        message.setUint8(0, 3);
        message.setUint8(1, incremental ? 1 : 0);
        message.setUint16(6, this.#width);
        message.setUint16(8, this.#height);
        this.#send(message);
    }

    #send(message) {
        if (this.#socket.readyState !== WebSocket.OPEN) return;
        this.#socket.send(Array.isArray(message) ? Uint8Array.from(message) : message);
    }

    /** A key goes down (again) or up: its scan code (0: none) and its symbol (0: none). */
    key(down, scan, symbol) {
        if (this.#extendedKeys) {
            const message = new DataView(new ArrayBuffer(12));
            message.setUint8(0, 255);
            message.setUint16(2, down ? 1 : 0);
            message.setUint32(4, symbol);
            message.setUint32(8, scan);
            this.#send(message);
        } else if (symbol !== 0) {
            const message = new DataView(new ArrayBuffer(8));
            message.setUint8(0, 4);
            message.setUint8(1, down ? 1 : 0);
            message.setUint32(4, symbol);
            this.#send(message);
        }
    }

    pointer(buttons, x, y) {
        const message = new DataView(new ArrayBuffer(6));
        message.setUint8(0, 5);
        message.setUint8(1, buttons);
        message.setUint16(2, x);
        message.setUint16(4, y);
        this.#send(message);
    }

    close() {
        this.#socket.close(1000);
    }
}

// ---- What the user does -----------------------------------------------------------------------------------------------------------------------------

/** Sends the keys that are typed while `canvas` has the focus. */
class Keyboard {
    #display;
    /** Keys that are down: scan code and symbol by place. */
    #down = new Map();
    #controlAt = 0;

    constructor(display, canvas) {
        this.#display = display;
        canvas.addEventListener("keydown", (event) => this.#press(event));
        canvas.addEventListener("keyup", (event) => this.#release(event));
        // Releases are not seen from elsewhere.
        canvas.addEventListener("blur", () => this.releaseAll());
    }

    #press(event) {
        event.preventDefault();
        if (event.isComposing) return;
        // Windows sends Control before AltGr, which nobody has pressed.
        if (event.key === "AltGraph" && event.timeStamp - this.#controlAt < 50) this.#up("ControlLeft");
        if (event.code === "ControlLeft" && !event.repeat) this.#controlAt = event.timeStamp;
        const scan = SCAN_CODES.get(event.code) ?? 0;
        const symbol = symbolOf(event);
        if (scan === 0 && symbol === 0) return;
        const place = event.code || event.key;
        // The release has to be of what was pressed, also if Shift has come or gone in between.
        const key = this.#down.get(place) ?? { scan, symbol };
        this.#down.set(place, key);
        this.#display.key(true, key.scan, key.symbol);
    }

    #release(event) {
        event.preventDefault();
        this.#up(event.code || event.key);
        // macOS does not tell of other keys' release while Command is held.
        if (event.key === "Meta") this.releaseAll();
    }

    #up(place) {
        const key = this.#down.get(place);
        if (!key) return;
        this.#down.delete(place);
        this.#display.key(false, key.scan, key.symbol);
    }

    releaseAll() {
        for (const place of [...this.#down.keys()]) this.#up(place);
    }

    /** Presses keys one after the other, and releases them in the opposite order. */
    chord(...keys) {
        for (const [code, symbol] of keys) this.#display.key(true, SCAN_CODES.get(code), symbol);
        for (const [code, symbol] of keys.reverse()) this.#display.key(false, SCAN_CODES.get(code), symbol);
    }
}

/** Sends what the pointer does over `canvas`. */
class Pointer {
    static #NOTCH = { pixels: 100, lines: 3 };
    #display;
    #canvas;
    #buttons = 0;
    #at = { x: 0, y: 0 };
    #frame = 0;
    #turned = { x: 0, y: 0 };

    constructor(display, canvas) {
        this.#display = display;
        this.#canvas = canvas;
        canvas.addEventListener("pointermove", (event) => this.#move(event));
        canvas.addEventListener("pointerdown", (event) => {
            canvas.focus();
            canvas.setPointerCapture(event.pointerId);
            this.#move(event);
        });
        for (const kind of ["pointerup", "pointercancel"]) canvas.addEventListener(kind, (event) => this.#move(event));
        canvas.addEventListener("wheel", (event) => this.#wheel(event), { passive: false });
        canvas.addEventListener("contextmenu", (event) => event.preventDefault());
    }

    #place({ clientX, clientY }) {
        const { width, height } = this.#display.size;
        const box = this.#canvas.getBoundingClientRect();
        const scale = Math.min(box.width / width, box.height / height) || 1;
        const clamp = (at, side) => Math.max(0, Math.min(side - 1, Math.floor(at)));
        this.#at = {
            x: clamp((clientX - box.left - (box.width - width * scale) / 2) / scale, width),
            y: clamp((clientY - box.top - (box.height - height * scale) / 2) / scale, height),
        };
    }

    #move(event) {
        event.preventDefault();
        this.#place(event);
        // Browsers: left, right, middle. RFB: left, middle, right.
        const { buttons } = event;
        const now = (buttons & 1) | ((buttons & 4) >> 1) | ((buttons & 2) << 1);
        if (now !== this.#buttons) {
            this.#buttons = now;
            this.#tell(now);
        } else if (this.#frame === 0) {
            // Of many moves the last one before a frame is enough.
            this.#frame = requestAnimationFrame(() => this.#tell(this.#buttons));
        }
    }

    #wheel(event) {
        event.preventDefault();
        this.#place(event);
        const notch = event.deltaMode === WheelEvent.DOM_DELTA_PIXEL ? Pointer.#NOTCH.pixels : Pointer.#NOTCH.lines;
        for (const [axis, delta, back, forth] of [["y", event.deltaY, 8, 16], ["x", event.deltaX, 32, 64]]) {
            this.#turned[axis] += delta / notch;
            while (Math.abs(this.#turned[axis]) >= 1) {
                const sign = Math.sign(this.#turned[axis]);
                this.#turned[axis] -= sign;
                this.#tell(this.#buttons | (sign < 0 ? back : forth));
                this.#tell(this.#buttons);
            }
        }
    }

    #tell(buttons) {
        cancelAnimationFrame(this.#frame);
        this.#frame = 0;
        this.#display.pointer(buttons, this.#at.x, this.#at.y);
    }
}

// ---- The page ---------------------------------------------------------------------------------------------------------------------------------------

function page() {
    const element = (id) => document.getElementById(id);
    const [canvas, status, ctrlAltDel, fullScreen] = ["screen", "status", "ctrl-alt-del", "full-screen"].map(element);
    const say = (text) => {
        status.textContent = text;
        status.hidden = text === "";
    };

    // A new link that is opened in this tab changes the fragment only.
    window.addEventListener("hashchange", () => location.reload());
    const link = new URLSearchParams(location.hash.slice(1));
    const [vm, ticket, name] = ["vm", "ticket", "name"].map((key) => link.get(key));
    // The ticket is a secret, and of no use a second time.
    history.replaceState(null, "", location.pathname);
    const again = `\nFor a new link: hci vm display ${name ?? "NAME"} --browser`;
    if (!vm || !ticket) {
        say(`This page shows a VM's screen when it is opened by a link.${again}`);
        return;
    }
    document.title = `${name ?? vm} – screen`;
    element("name").textContent = name ?? vm;
    say("Connecting …");

    const url = new URL(`/v1/vms/${encodeURIComponent(vm)}/display`, location.href);
    url.protocol = location.protocol === "http:" ? "ws:" : "wss:";
    const socket = new WebSocket(url, [PROTOCOL, `ticket.${ticket}`]);
    const buttons = [ctrlAltDel, fullScreen];
    const display = new Display(socket, canvas, () => {
        if (!status.hidden) {
            say("");
            buttons.forEach((button) => { button.disabled = false; });
            canvas.focus();
        }
        const { width, height } = display.size;
        element("size").textContent = `${width} × ${height}`;
    });
    const keyboard = new Keyboard(display, canvas);
    new Pointer(display, canvas);
    ctrlAltDel.addEventListener("click", () => {
        keyboard.chord(["ControlLeft", 0xffe3], ["AltLeft", 0xffe9], ["Delete", 0xffff]);
        canvas.focus();
    });
    fullScreen.addEventListener("click", async () => {
        await element("stage").requestFullscreen();
        canvas.focus();
        // Where there is such a thing, Escape and the browser's own keys go to the guest too; holding Escape ends it.
        await navigator.keyboard?.lock?.().catch(() => {});
    });
    window.addEventListener("pagehide", () => keyboard.releaseAll());

    display.run().catch((error) => {
        if (!(error instanceof Ended)) console.error(error);
        display.close();
        buttons.forEach((button) => { button.disabled = true; });
        if (document.fullscreenElement) document.exitFullscreen();
        say((error instanceof Ended ? error.message : "This page has failed.") + again);
    });
}

// Not where this file is tested without a page.
if (typeof document !== "undefined") page();
