'use strict';

const byId = (id) => document.getElementById(id);
const TOP = 4; // alternatives to show of each token
let card = null; // what the server says of the model
let panels = [];
let busy = 0; // panels that are being written

// The model

async function findModel() {
  try {
    const reply = await fetch('/v1/models', { headers: headers() });
    if (reply.status === 401) return askForKey();
    if (reply.ok) return showModel((await reply.json()).data[0]);
    byId('facts').textContent = 'Waiting for the model …';
  } catch {
    byId('facts').textContent = 'The server does not answer.';
  }
  setTimeout(findModel, 1000);
}

function askForKey() {
  byId('facts').textContent = 'This server asks for an API key.';
  byId('key-field').hidden = false;
  byId('key').onchange = findModel;
}

function showModel(found) {
  card = found;
  byId('model').textContent = card.id;
  byId('facts').textContent = `${card.num_recursions} recursions · up to ${card.max_model_len} tokens`;
  // Its colours depend on the number of recursions, which was not known if the page came before the model.
  const colors = document.querySelector('link[href^="/page/depths.css"]');
  colors.href = `/page/depths.css?depths=${card.num_recursions}`;
  byId('dials').hidden = !card.has_dial;
  byId('modes').hidden = !card.has_chat;
  byId('tokens').max = card.limits.max_tokens;
  const usual = card.mean_depth ?? (1 + card.num_recursions) / 2;
  for (const [id, value] of [['dial-a', usual], ['dial-b', card.num_recursions]]) {
    const dial = byId(id);
    dial.max = card.num_recursions;
    dial.value = value;
    dial.oninput = () => { byId(`${id}-value`).textContent = Number(dial.value).toFixed(1); };
    dial.oninput();
  }
  const legend = byId('legend');
  legend.replaceChildren('depth');
  for (let depth = 1; depth <= card.num_recursions; depth++) legend.append(make('span', `chip d${depth}`, String(depth)));
  byId('go').disabled = false;
  arrange();
}

function headers() {
  const key = byId('key').value;
  return { 'Content-Type': 'application/json', ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

// What is asked

const isChat = () => card.has_chat && document.querySelector('[name=mode]:checked').value === 'chat';
const isComparing = () => card.has_dial && byId('compare').checked;

function request(panel, prompt) {
  const body = { model: card.id, stream: true, max_tokens: Number(byId('tokens').value) || 120 };
  body.temperature = byId('temperature').value === '' ? 1 : Number(byId('temperature').value);
  if (byId('seed').value !== '') body.seed = Number(byId('seed').value);
  if (card.has_dial) body.mean_depth = panel.budget();
  if (!isChat()) return ['/v1/completions', { ...body, prompt, logprobs: TOP }];
  panel.turns.push({ role: 'user', content: prompt });
  const messages = panel.turns.map(({ role, content }) => ({ role, content }));
  return ['/v1/chat/completions', { ...body, messages, logprobs: true, top_logprobs: TOP }];
}

// A panel: one budget, its text and its figures

class Panel {
  constructor(letter) {
    this.letter = letter;
    this.turns = [];
    this.element = byId('panel').content.firstElementChild.cloneNode(true);
    this.text = this.element.querySelector('.text');
    this.rows = [];
    for (let depth = 1; depth <= card.num_recursions; depth++) this.addRow(depth);
    this.text.addEventListener('keydown', (event) => this.walk(event));
    this.clear();
  }

  budget() { return Number(byId(`dial-${this.letter}`).value); }

  addRow(depth) {
    const row = make('tr'), head = make('th', '', String(depth)), cell = make('td');
    head.scope = 'row';
    const track = make('span', `track d${depth}`), share = make('td', '', '');
    cell.append(track);
    row.append(head, cell, share);
    this.element.querySelector('tbody').append(row);
    this.rows.push({ track, share });
  }

  clear() {
    this.length = 0; // characters written, as the server counts them
    this.content = '';
    this.tokens = [];
    this.counts = this.rows.map(() => 0);
    this.first = this.last = 0;
    this.show();
  }

  begin(prompt) {
    this.clear();
    const title = card.has_dial ? `mean depth ${this.budget().toFixed(1)}` : 'text';
    this.element.querySelector('h2').textContent = title;
    if (isChat()) {
      this.place = make('span', 'turn');
      this.text.append(turn('you', prompt), this.place);
      this.place.append(make('span', 'who', 'model'));
    } else {
      this.text.replaceChildren(make('span', 'given', prompt));
      this.place = this.text;
    }
  }

  // What is new: a choice of a chunk of either interface.
  add(choice) {
    const now = performance.now(), text = choice.text ?? choice.delta.content ?? '';
    const characters = Array.from(text), tokens = readTokens(choice);
    tokens.forEach((token, index) => {
      const next = tokens[index + 1], start = token.offset - this.length;
      const end = next ? next.offset - this.length : characters.length;
      this.addToken(token, characters.slice(start, end).join(''));
    });
    if (tokens.length) {
      this.first ||= now;
      this.last = now;
    }
    this.length += characters.length;
    this.content += text;
    this.show();
  }

  addToken(token, text) {
    const element = make('span', `t d${token.depth}`, text ? text.replaceAll('\n', '↵\n') : '·');
    element.dataset.d = token.depth;
    element.token = token;
    this.place.append(element);
    this.tokens.push(element);
    this.counts[token.depth - 1] += 1;
  }

  show() {
    const count = this.tokens.length, seconds = (this.last - this.first) / 1000;
    const sum = (weigh) => this.counts.reduce((total, number, index) => total + number * weigh(index), 0);
    this.say('speed', count > 1 && seconds ? number((count - 1) / seconds) : '–');
    this.say('depth', count ? (sum((index) => index + 1) / count).toFixed(2) : '–');
    this.say('bytes', count ? bytes(sum((index) => card.kv_bytes[index])) : '–');
    this.rows.forEach(({ track, share }, index) => {
      const part = count ? this.counts[index] / count : 0;
      track.style.width = `${(100 * part).toFixed(1)}%`;
      share.textContent = count ? `${this.counts[index]} (${Math.round(100 * part)}%)` : '';
    });
  }

  say(name, text) { this.element.querySelector(`[data-of=${name}]`).textContent = text; }

  // Arrow keys go from token to token.
  walk(event) {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    const tokens = [...this.text.querySelectorAll('.t')];
    if (!step && event.key !== 'Home' && event.key !== 'End' || !tokens.length) return;
    event.preventDefault();
    const at = tokens.indexOf(explained);
    const to = event.key === 'Home' ? 0 : event.key === 'End' ? tokens.length - 1 : at < 0 ? 0 : at + step;
    explain(tokens[Math.max(0, Math.min(tokens.length - 1, to))]);
    explained.scrollIntoView({ block: 'nearest' });
  }
}

function readTokens(choice) {
  const told = choice.logprobs;
  if (!told) return [];
  if (told.content) {
    return told.content.map((token) => ({
      name: token.token, depth: token.depth, logprob: token.logprob, offset: token.text_offset,
      others: token.top_logprobs.map((other) => [other.token, other.logprob]),
    }));
  }
  return told.tokens.map((name, index) => ({
    name, depth: choice.depths[index], logprob: told.token_logprobs[index], offset: told.text_offset[index],
    others: Object.entries(told.top_logprobs[index] ?? {}),
  }));
}

function turn(who, text) {
  const element = make('span', 'turn');
  element.append(make('span', 'who', who), make('span', 'given', text));
  return element;
}

// Writing

async function write() {
  if (!card || busy) return;
  const prompt = byId('prompt').value, mine = panels;
  byId('problem').hidden = true;
  hide();
  busy = mine.length;
  update();
  if (isChat()) byId('prompt').value = '';
  await Promise.allSettled(mine.map((panel) => writePanel(panel, prompt)));
  busy = 0;
  update();
}

async function writePanel(panel, prompt) {
  panel.stopper = new AbortController();
  panel.begin(prompt);
  panel.element.setAttribute('aria-busy', 'true');
  try {
    const [path, body] = request(panel, prompt);
    const reply = await fetch(path, {
      method: 'POST', headers: headers(), body: JSON.stringify(body), signal: panel.stopper.signal,
    });
    if (!reply.ok) throw new Error((await reply.json()).error.message);
    await readEvents(reply.body, (chunk) => {
      if (chunk.error) throw new Error(chunk.error.message);
      for (const choice of chunk.choices) panel.add(choice);
    });
  } catch (error) {
    if (error.name !== 'AbortError') complain(error.message);
  } finally {
    if (isChat()) panel.turns.push({ role: 'assistant', content: panel.content });
    panel.element.setAttribute('aria-busy', 'false');
  }
}

async function readEvents(stream, hear) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = '';
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const events = (rest + value).split('\n\n');
    rest = events.pop();
    for (const event of events) {
      const data = event.slice('data: '.length);
      if (data !== '[DONE]') hear(JSON.parse(data));
    }
  }
}

function stop() {
  for (const panel of panels) panel.stopper?.abort();
}

function complain(message) {
  byId('problem').textContent = message;
  byId('problem').hidden = false;
}

function update() {
  byId('go').disabled = busy > 0 || !card;
  byId('stop').disabled = busy === 0;
  byId('hint').hidden = !panels.some((panel) => panel.tokens.length);
  byId('forget').hidden = !card || !isChat();
}

// One panel or two; a change of mode or number begins anew.
function arrange() {
  stop();
  byId('second').hidden = !isComparing();
  panels = (isComparing() ? ['a', 'b'] : ['a']).map((letter) => new Panel(letter));
  byId('panels').classList.toggle('two', panels.length === 2);
  byId('panels').replaceChildren(...panels.map((panel) => panel.element));
  byId('prompt').placeholder = isChat() ? 'Your message' : 'Text to go on from';
  hide();
  update();
}

// The card that explains a token

let explained = null;

function explain(element) {
  hide();
  explained = element;
  element.classList.add('on');
  const { token } = element, tip = byId('tip');
  const head = `depth ${token.depth} of ${card.num_recursions} · probability ${percent(token.logprob)}`;
  const table = make('table');
  const others = new Map([...token.others, [token.name, token.logprob]]);
  for (const [name, logprob] of [...others].sort((one, other) => other[1] - one[1])) {
    const row = make('tr', name === token.name ? 'chosen' : '');
    row.append(make('td', '', visible(name)), make('td', '', percent(logprob)));
    table.append(row);
  }
  tip.replaceChildren(make('div', '', head), table);
  tip.style.display = 'block';
  const box = element.getClientRects()[0] ?? element.getBoundingClientRect();
  const width = document.documentElement.clientWidth;
  tip.style.left = `${Math.max(8, Math.min(box.left, width - tip.offsetWidth - 8)) + scrollX}px`;
  const above = box.top - tip.offsetHeight - 8;
  tip.style.top = `${(above > 0 ? above : box.bottom + 8) + scrollY}px`;
}

function hide() {
  byId('tip').style.display = 'none';
  explained?.classList.remove('on');
  explained = null;
}

// Small things

function make(tag, className = '', text = null) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== null) element.textContent = text; // text of a model or a user is never markup
  return element;
}

const number = (value) => value.toLocaleString('en', { maximumFractionDigits: value < 100 ? 1 : 0 });
const bytes = (value) => (value < 1e6 ? `${number(value / 1e3)} kB` : `${number(value / 1e6)} MB`);
const percent = (logprob) => `${(100 * Math.exp(logprob)).toPrecision(3)}%`;
const visible = (text) => text.replaceAll('\n', '↵').replaceAll('\t', '⇥').replaceAll(' ', '␣');

byId('ask').addEventListener('submit', (event) => { event.preventDefault(); write(); });
byId('prompt').addEventListener('keydown', (event) => {
  if (event.key === 'Enter' && (event.ctrlKey || event.metaKey)) { event.preventDefault(); write(); }
});
byId('stop').addEventListener('click', stop);
byId('compare').addEventListener('change', arrange);
byId('forget').addEventListener('click', arrange);
for (const mode of document.querySelectorAll('[name=mode]')) mode.addEventListener('change', arrange);
byId('numbers').addEventListener('click', () => {
  byId('numbers').setAttribute('aria-pressed', String(byId('panels').classList.toggle('numbers')));
});
byId('panels').addEventListener('pointerover', (event) => {
  const token = event.target.closest('.t');
  if (token) explain(token);
});
byId('panels').addEventListener('pointerleave', (event) => { if (event.pointerType === 'mouse') hide(); });
document.addEventListener('click', (event) => {
  const token = event.target.closest('.t');
  if (token) explain(token); else hide();
});
document.addEventListener('keydown', (event) => {
  if (event.key !== 'Escape') return;
  if (busy) stop();
  hide();
});
findModel();
