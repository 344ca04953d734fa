// Asks by the AI SDK's OpenAI-compatible provider: `node ask_ai_sdk.mjs URL MODEL`; the last line of the output is JSON.

import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, streamText } from "ai";

const [url, model] = process.argv.slice(2);
const provider = createOpenAICompatible({ name: "cog", baseURL: url, apiKey: "any", includeUsage: true });
const settings = { temperature: 0, maxOutputTokens: 12, maxRetries: 0 };
const chat = { model: provider.chatModel(model), prompt: "Once upon a time", ...settings };
const raw = { model: provider.completionModel(model), prompt: "Once upon a time", ...settings };

const whole = await generateText(chat);
const stream = streamText(chat);
let streamed = "";
for await (const piece of stream.textStream) streamed += piece;
const continued = await generateText(raw);
let refused = "";
try {
  await generateText({ ...chat, model: provider.chatModel("no-such-model") });
} catch (error) {
  refused = error.message;
}
const found = {
  whole: whole.text,
  usage: [whole.usage.inputTokens, whole.usage.outputTokens],
  finish: whole.finishReason,
  streamed,
  streamedUsage: (await stream.usage).outputTokens,
  raw: continued.text,
  refused,
};
console.log(JSON.stringify(found));
