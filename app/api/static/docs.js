"use strict";
// Once another type of body is chosen, Swagger UI would show and send a form's fields as JSON.
const freshBody = {statePlugins: {oas3: {wrapActions: {setRequestContentType: (choose, {oas3Actions}) => (chosen) => {
  oas3Actions.setRequestBodyValue({value: undefined, pathMethod: chosen.pathMethod});
  return choose(chosen);
}}}}};
SwaggerUIBundle({url: "openapi.json", dom_id: "#swagger-ui", deepLinking: true, tryItOutEnabled: true,
                 validatorUrl: null, plugins: [freshBody]});
