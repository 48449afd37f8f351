"use strict";

const byId = (id) => document.getElementById(id);
/** A word of a command, quoted for the shell. */
const quoted = (word) => `'${word.replaceAll("'", "'\\''")}'`;

/** An element with attributes and children; null children are left out. */
function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children.filter((child) => child !== null));
  return made;
}
