(function () {
  var text = document.querySelector('.text'), tip = document.getElementById('tip'), shown = null;

  function hide() {
    tip.style.display = 'none';
    if (shown) shown.classList.remove('on');
    shown = null;
  }

  function show(token) {
    hide();
    shown = token;
    token.classList.add('on');
    var words = ['depth ' + token.dataset.d + ' of ' + text.dataset.depths];
    if (token.dataset.p) words.push('probability ' + token.dataset.p);
    if (token.classList.contains('given')) words.push('part of the prompt');
    tip.textContent = words.join(' \u00b7 ');
    tip.style.display = 'block';
    var box = token.getClientRects()[0] || token.getBoundingClientRect();
    var width = document.documentElement.clientWidth;
    tip.style.left = Math.max(8, Math.min(box.left, width - tip.offsetWidth - 8)) + scrollX + 'px';
    tip.style.top = box.top + scrollY - tip.offsetHeight - 8 + 'px';
  }

  text.addEventListener('pointerover', function (event) {
    var token = event.target.closest('.t');
    if (token) show(token);
  });
  text.addEventListener('pointerleave', function (event) {
    if (event.pointerType === 'mouse') hide();
  });
  document.addEventListener('click', function (event) {
    var token = event.target.closest && event.target.closest('.t');
    if (token) show(token); else hide();
  });
  document.addEventListener('keydown', function (event) {
    if (event.key === 'Escape') hide();
  });

  var button = document.getElementById('numbers');
  button.addEventListener('click', function () {
    button.setAttribute('aria-pressed', String(text.classList.toggle('numbers')));
  });
})();
